"""Start of a server: options to a configuration, sockets and keys, the lines printed before it runs."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from normistral.artifact.artifact import Artifact
from normistral.errors import UsageError
from normistral.hardware import available_memory_bytes
from normistral.runtime.engines.settings import DEFAULT_CONFIG, EngineConfig
from normistral.server.auth import Keys, read_keys
from normistral.server.backends.settings import (
    Batching,
    BatchSettings,
    plan_cache_bytes,
    require_one_context,
    uses_continuous_batching,
)
from normistral.server.ipc import Loaded
from normistral.server.limits import GIB, MIB, ServerLimits
from normistral.server.model_handler import ModelHandler
from normistral.server.server import is_loopback, url_of

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._-]+(:\d{1,5})?|[a-z][a-z0-9+.-]*://\[[0-9a-f:]+\](:\d{1,5})?")
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the artifacts are loaded and share the machine.

    Attributes:
        cache_mib: for the KV caches of each artifact; None follows the memory.
        slots: answers at once of each; None is as many as suit its engine.
    """

    config: EngineConfig = DEFAULT_CONFIG
    batching: Batching = "auto"
    cache_mib: int | None = None
    slots: int | None = None


def open_artifacts(artifacts: Sequence[str], options: EngineOptions, limits: ServerLimits) -> list[ModelHandler]:
    """Everything of the artifacts but their engines.

    Raises:
        NormistralError: as `ModelHandler.open`; or two have one name, or the KV cache is too small.
    """
    handler: list[ModelHandler] = []
    for artifact in artifacts:
        manifest = Artifact.find(artifact, verify=False).manifest
        context = limits.context_of(manifest.context_length)
        cache_bytes = (
            plan_cache_bytes(manifest, context, len(artifacts))
            if options.cache_mib is None
            else options.cache_mib * MIB
        )
        batch = BatchSettings(options.batching, cache_bytes, context, options.slots)
        if not uses_continuous_batching(manifest, options.batching, options.config.device):
            require_one_context(manifest, batch)
        one = ModelHandler.open(
            artifact,
            batch,
            limits.new_tokens,
            config=options.config,
        )
        if one.name in {other.name for other in handler}:
            raise UsageError(f"two artifacts are called {one.name}", "rename the folder of one of them")
        handler.append(one)
    return handler


def choose_keys(listener: socket.socket, key_file: Path | None, *, no_api_key: bool) -> Keys:
    """The keys that are asked for.

    Raises:
        UsageError: there are none, and others than this machine reach the server; or some, against --no-api-key.
    """
    keys = read_keys(key_file)
    if keys and no_api_key:
        raise UsageError("there are API keys, and --no-api-key", "leave one of them out")
    if not keys and not no_api_key and not is_loopback(listener):
        raise UsageError(
            "others reach this address, and there is no API key",
            "give --api-key-file FILE or NORMISTRAL_API_KEYS, or --no-api-key if everybody may ask",
        )
    return keys


def read_origins(origins: Sequence[str]) -> frozenset[str]:
    """Origins of web pages in the form in which browsers send them.

    Raises:
        UsageError: one is no origin.
    """
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin.lower()):
            raise UsageError(
                f"{origin!r} is no origin", "such as https://example.org or http://localhost:3000, without a path"
            )
    return frozenset(origin.lower() for origin in origins)


def allowed_hosts(listener: socket.socket, keys: Keys, more: Sequence[str]) -> set[str] | None:
    """Names under which the server may be addressed; None is any, where a key keeps others out or all are let in."""
    if keys or not is_loopback(listener):
        return None
    return {*_LOOPBACK_HOSTS, listener.getsockname()[0], *(name.lower() for name in more)}


def describe_server(
    handler: Sequence[ModelHandler], limits: ServerLimits, keys: Keys, listener: socket.socket
) -> Iterator[str]:
    """What is served, where, for whom, within which limits, and what memory it may take."""
    names = ", ".join(f"{one.name} ({one.manifest.format}, {one.manifest.role})" for one in handler)
    whom = f"{len(keys)} API keys" if keys else "no API key asked for"
    yield f"serving {names} at {url_of(listener)}/v1, {whom}"
    for one in handler:
        yield f"{one.name}: prompt and answer take at most {one.context_length} tokens, an answer {one.new_tokens}"
    yield (
        f"limits: {limits.jobs} answers under way ({limits.tenant_jobs} for one key), {limits.choices} for a request, "
        f"{limits.queue_s:g} s until one begins, {limits.request_s:g} s until it is whole, "
        f"{limits.body_bytes // 2**10} KiB for a body, {limits.connections} connections"
    )
    weights = sum(one.manifest.total_bytes for one in handler)
    caches = sum(one.load.batch.cache_bytes for one in handler)
    bodies = limits.connections * limits.body_bytes
    yield (
        f"memory: weights {weights / GIB:.2f} GiB, KV caches at most {caches / GIB:.2f} GiB, requests at most "
        f"{bodies / GIB:.2f} GiB, and what engine and server take for themselves; "
        f"{available_memory_bytes() / GIB:.1f} GiB are available"
    )


def describe_model(name: str, loaded: Loaded) -> str:
    """How a model that was loaded answers many at once."""
    return (
        f"{name}: {loaded.slots} answers at once, computed {loaded.batching}; "
        f"they may hold {loaded.cache_tokens:,} tokens, in {loaded.cache_bytes / GIB:.1f} GiB of memory"
    )


def describe_start(handler: Sequence[ModelHandler], limits: ServerLimits, listener: socket.socket) -> dict[str, object]:
    """The same for programs."""
    return {
        "url": url_of(listener),
        "pid": os.getpid(),
        "models": [one.name for one in handler],
        "weights_bytes": sum(one.manifest.total_bytes for one in handler),
        "cache_bytes": sum(one.load.batch.cache_bytes for one in handler),
        "requests_bytes": limits.connections * limits.body_bytes,
    }
