"""`normistral serve`: answers over HTTP."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from normistral.commands import console
from normistral.commands.find_artifact import find_or_make
from normistral.commands.options import (
    OUTPUT,
    Debug,
    EngineArgs,
    OverflowPolicy,
    Verbose,
    complete_artifact,
    given,
)
from normistral.errors import MissingExtraError, UsageError, install_extra
from normistral.runtime.overflow import OVERFLOW
from normistral.server.backends.base import Batching
from normistral.server.limits import ServerLimits

_LIMITS = ServerLimits()


def serve(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT...",
            help="Exported models: folders, names in the store, presets, or OWNER/NAME of published ones; or a folder "
            "of such folders.",
            autocompletion=complete_artifact,
        ),
    ],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Listen here.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="API keys: one on each line, and after a blank whose it is."),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Ask nobody for a key, though others reach the address.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A further name under which a server without keys is addressed."),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Web pages of this origin, such as https://example.org, may ask (CORS); * is every page.",
        ),
    ] = None,
    store: Annotated[
        bool, typer.Option("--store", help="Keep answers of /v1/responses that ask for it, in memory.")
    ] = False,
    prefix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Keep a text (a system prompt, a document) or a saved prefix in the KV cache, for all keys.",
        ),
    ] = None,
    batching: Annotated[
        Batching,
        typer.Option(help="auto computes answers together where the engine can; off lets them take turns."),
    ] = "auto",
    slots: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Answers at once. Default: as many as suit the engine.")
    ] = None,
    cache_mib: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Memory for the KV caches of each artifact, in MiB. Default: by what is free."
        ),
    ] = None,
    memory_mib: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Memory for all loaded models, in MiB; the least recently used one makes room. "
            "Default: 90 % of what is free for several models, no limit for one.",
        ),
    ] = None,
    idle_minutes: Annotated[
        float | None,
        typer.Option(metavar="M", min=0.01, help="Unload a model that nobody asked for so long. Default: never."),
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Tokens of prompt and answer. Default: the model's.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens of an answer. Default: what fits.")
    ] = None,
    overflow: OverflowPolicy = OVERFLOW,
    max_choices: Annotated[int, typer.Option(metavar="N", min=1, help="Answers to one request.")] = _LIMITS.choices,
    max_queue: Annotated[int, typer.Option(metavar="N", min=1, help="Answers under way, in all.")] = _LIMITS.jobs,
    max_queue_per_key: Annotated[
        int, typer.Option(metavar="N", min=1, help="Answers under way for one key.")
    ] = _LIMITS.tenant_jobs,
    max_body_kib: Annotated[int, typer.Option(metavar="N", min=1, help="Of a request.")] = _LIMITS.body_bytes // 2**10,
    max_connections: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help=f"Open at once. Default: {_LIMITS.connections}, or fewer where the limit of open files is low.",
        ),
    ] = None,
    queue_seconds: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="Until an answer begins.")
    ] = _LIMITS.queue_s,
    request_seconds: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="Until an answer is whole.")
    ] = _LIMITS.request_s,
    grace_seconds: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="For answers under way after the first Ctrl-C or SIGTERM.")
    ] = _LIMITS.grace_s,
    *,
    engine: EngineArgs,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print where it listens, as a line of JSON.", rich_help_panel=OUTPUT)
    ] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Answer programs and browsers over HTTP, as OpenAI's, Ollama's and Anthropic's APIs do.

    /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models, /api/chat, /api/generate; also
    /health, /ready, /metrics, and a page to chat with at /.
    Ends on Ctrl-C or SIGTERM when the answers under way are written; a second one ends at once. With --json one line on
    stdout says where it listens. docs/serving.md says more.
    """
    limits = ServerLimits(
        **given(context=max_context, new_tokens=max_new_tokens),
        body_bytes=max_body_kib * 2**10,
        choices=max_choices,
        jobs=max_queue,
        tenant_jobs=min(max_queue_per_key, max_queue),
        connections=max_connections or _LIMITS.connections,
        queue_s=queue_seconds,
        request_s=request_seconds,
        grace_s=grace_seconds,
        overflow=overflow,
    )
    settings = engine.settings
    _require_extra()
    from normistral.runtime.kernels.library import name_faster_way
    from normistral.server.app import create_app
    from normistral.server.limits import plan_connections
    from normistral.server.prefixes import read_prefixes
    from normistral.server.server import ApiServer, bind
    from normistral.server.startup import (
        EngineOptions,
        allowed_hosts,
        choose_keys,
        describe_model,
        describe_server,
        describe_start,
        find_artifacts,
        open_artifacts,
        plan_residency,
        read_origins,
    )

    served_connections = plan_connections(limits.connections).served
    if max_connections is not None and served_connections < max_connections:
        raise UsageError(
            f"the limit of open files allows {served_connections} connections, not {max_connections}",
            f"raise it: ulimit -n {2 * max_connections + 256}",
        )
    limits = replace(limits, connections=served_connections)
    found = find_artifacts([find_or_make(artifact) for artifact in artifacts])
    for reason in found.left_out:
        console.warn(reason)
    names = [str(folder) for folder in found.artifacts]
    residency = plan_residency(names, memory_mib, idle_minutes, found.on_demand)
    options = EngineOptions(engine.config, batching, cache_mib, slots)
    served = open_artifacts(names, options, limits, residency.budget_bytes, read_prefixes(prefix or ()))
    with bind(host, port) as listener:
        keys = choose_keys(listener, api_key_file, no_api_key=no_api_key)
        hosts = allowed_hosts(listener, keys, allowed_host or ())
        origins = read_origins(allowed_origin or ())
        app = create_app(served, limits, keys, hosts, origins=origins, store=store, residency=residency)

        def announce() -> None:
            for line in describe_server(served, limits, keys, listener, residency.budget_bytes):
                console.say(line)
            if as_json:
                print(json.dumps(describe_start(served, limits, listener)), flush=True)

        def announce_ready() -> None:
            for name, model in server.service.models.items():
                if model.worker.loaded is not None:
                    for line in describe_model(name, model.worker.loaded):
                        console.say(line)
                    if faster := name_faster_way(model.worker.loaded.settings, settings):
                        console.say(f"{name}: {faster}")
            console.say("ready")

        server = ApiServer(app, announce, announce_ready)
        server.run([listener])
    if server.failure is not None:
        raise server.failure
    print("stopped", file=sys.stderr)


def _require_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as exc:
        raise MissingExtraError(f"{exc.name} is not installed", install_extra("serve")) from exc
