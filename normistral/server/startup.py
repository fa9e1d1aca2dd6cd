"""Start of a server: options to a configuration, sockets and keys, the lines printed before it runs."""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import MANIFEST_NAME, Manifest
from normistral.artifact.store import StoredArtifact, list_artifacts
from normistral.errors import EXPORT_AGAIN, NormistralError, UsageError
from normistral.hardware import available_memory_bytes
from normistral.runtime.engines.settings import DEFAULT_CONFIG, EngineConfig
from normistral.server.auth import Keys, read_keys
from normistral.server.backends.base import (
    Batching,
    BatchSettings,
    cache_token_bytes,
    plan_cache_bytes,
    require_one_context,
    uses_continuous_batching,
)
from normistral.server.ipc import Loaded
from normistral.server.limits import GIB, MIB, ServerLimits, require_above_zero
from normistral.server.model_handler import ModelHandler, model_memory_bytes
from normistral.server.prefixes import PrefixFile, add_prefixes
from normistral.server.residency import ResidencyOptions
from normistral.server.server import is_loopback, url_of

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._-]+(:\d{1,5})?|[a-z][a-z0-9+.-]*://\[[0-9a-f:]+\](:\d{1,5})?")
_MODELS_SHARE = 0.9  # of the available memory, for several models; the rest is the server's own, and its requests'
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


class FoundArtifacts(NamedTuple):
    """Artifacts that were named, one by one or by the folder that they are in.

    Attributes:
        on_demand: names of those that were found in a folder.
        left_out: why others in such a folder are no artifacts.
    """

    artifacts: list[Path]
    on_demand: frozenset[str]
    left_out: list[str]


def find_artifacts(folders: Sequence[Path]) -> FoundArtifacts:
    """Artifacts, and those in folders of artifacts.

    Raises:
        UsageError: none in such a folder can be used.
    """
    artifacts: list[Path] = []
    on_demand: list[str] = []
    left_out: list[str] = []
    taken = {folder.resolve() for folder in folders if (folder / MANIFEST_NAME).is_file()}
    for folder in folders:
        inside = [] if (folder / MANIFEST_NAME).is_file() else list_artifacts(folder)
        if not any(isinstance(one.content, Manifest) for one in inside):  # opening it says what is wrong with it
            artifacts.append(folder)
            continue
        for one in inside:
            reason, place = _find_damage(one), one.path.resolve()
            if reason is not None:
                left_out.append(f"{one.path} is left out: {reason}")
            elif place not in taken:  # another name of a folder is no other model
                taken.add(place)
                artifacts.append(one.path)
                on_demand.append(place.name)
    if not artifacts:
        raise UsageError(f"no artifact can be used: {left_out[0]}", EXPORT_AGAIN)
    return FoundArtifacts(artifacts, frozenset(on_demand), left_out)


def _find_damage(found: StoredArtifact) -> str | None:
    """Why an artifact in a folder of them cannot be served; one must not keep the others from it."""
    if isinstance(found.content, str):
        return found.content
    try:
        Artifact.open(found.path)
    except NormistralError as exc:
        return exc.message
    return None


def plan_residency(
    artifacts: Sequence[str],
    memory_mib: int | None,
    idle_minutes: float | None,
    on_demand: frozenset[str] = frozenset(),
) -> ResidencyOptions:
    """Which models are in memory; by default several take 90 % of what is available, and one what it needs.

    Raises:
        UsageError: the minutes are no number.
    """
    if idle_minutes is not None:
        require_above_zero("idle_minutes", idle_minutes)
    if memory_mib is not None:
        budget: int | None = memory_mib * MIB
    else:
        budget = int(_MODELS_SHARE * available_memory_bytes()) if len(artifacts) > 1 else None
    return ResidencyOptions(budget, None if idle_minutes is None else 60 * idle_minutes, on_demand)


def open_artifacts(
    artifacts: Sequence[str],
    options: EngineOptions,
    limits: ServerLimits,
    budget_bytes: int | None = None,
    prefixes: Sequence[PrefixFile] = (),
) -> list[ModelHandler]:
    """Everything of the artifacts but their engines.

    Args:
        budget_bytes: for all models that are loaded at the same time; None is what is available.

    Raises:
        NormistralError: as `ModelHandler.open` and `add_prefixes`; or two have one name, the KV cache is too small, or
            no model fits into the budget.
    """
    handler: list[ModelHandler] = []
    manifests = [Artifact.find(artifact, verify=False).manifest for artifact in artifacts]
    contexts = [limits.context_of(manifest.context_length) for manifest in manifests]
    sharers, spare = _share_memory(manifests, contexts, budget_bytes)
    for artifact, manifest, context in zip(artifacts, manifests, contexts, strict=True):
        if options.cache_mib is None:
            planned = plan_cache_bytes(manifest, context, sharers, budget_bytes)
            cache_bytes = int(min(planned, context * cache_token_bytes(manifest) + spare))
        else:
            cache_bytes = options.cache_mib * MIB
        batch = BatchSettings(options.batching, cache_bytes, context, options.slots)
        if not uses_continuous_batching(manifest, options.batching, options.config.device):
            require_one_context(manifest, batch)
        one = ModelHandler.open(
            artifact,
            batch,
            limits.new_tokens,
            config=options.config,
        )
        if other := next((other for other in handler if other.name == one.name), None):
            if other.folder.resolve() == one.folder.resolve():
                raise UsageError(f"{one.name} is given twice", "leave it out once")
            raise UsageError(f"two artifacts are called {one.name}", "rename the folder of one of them")
        handler.append(one)
    handler = add_prefixes(handler, prefixes)
    smallest = min(handler, key=lambda one: one.memory_bytes)
    if budget_bytes is not None and smallest.memory_bytes > budget_bytes:
        raise UsageError(
            f"{smallest.name} takes up to {smallest.memory_bytes / MIB:.0f} MiB with its KV cache, and loaded models "
            f"may take {budget_bytes / MIB:.0f} MiB",
            "give --memory-mib more, or --cache-mib or --max-context less",
        )
    return handler


def _share_memory(
    manifests: Sequence[Manifest], contexts: Sequence[int], budget_bytes: int | None
) -> tuple[int, float]:
    """How many models are in memory at the same time, and bytes that are left for each with a cache of one context.

    All of them, or as many of the largest as there is room for.
    """
    least = [
        model_memory_bytes(manifest, context * cache_token_bytes(manifest))
        for manifest, context in zip(manifests, contexts, strict=True)
    ]
    if budget_bytes is None:
        return len(least), math.inf
    if sum(least) > budget_bytes:
        largest = max((one for one in least if one <= budget_bytes), default=budget_bytes)
        least = [largest] * (budget_bytes // largest)
    return len(least), max(0, budget_bytes - sum(least)) // len(least)


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
    handler: Sequence[ModelHandler],
    limits: ServerLimits,
    keys: Keys,
    listener: socket.socket,
    budget_bytes: int | None = None,
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
    if budget_bytes is not None and sum(one.memory_bytes for one in handler) > budget_bytes:
        yield (
            f"models are loaded when they are asked for, into {budget_bytes / GIB:.2f} GiB of memory; "
            + ", ".join(f"{one.name} takes up to {one.memory_bytes / GIB:.2f}" for one in handler)
        )
    weights = sum(one.manifest.total_bytes for one in handler)
    caches = sum(one.load.batch.cache_bytes for one in handler)
    bodies = limits.connections * limits.body_bytes
    yield (
        f"memory: weights {weights / GIB:.2f} GiB, KV caches at most {caches / GIB:.2f} GiB, requests at most "
        f"{bodies / GIB:.2f} GiB, and what engine and server take for themselves; "
        f"{available_memory_bytes() / GIB:.1f} GiB are available"
    )


def describe_model(name: str, loaded: Loaded) -> Iterator[str]:
    """How a model that was loaded answers many at once, and its prefixes."""
    yield (
        f"{name}: {loaded.slots} answers at once, computed {loaded.batching}; "
        f"they may hold {loaded.cache_tokens:,} tokens, in {loaded.cache_bytes / GIB:.1f} GiB of memory"
    )
    for prefix in loaded.prefixes:
        yield f"{name}: {prefix}"


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
