"""A server whose worker process has a scripted model behind every artifact; the artifact's script.json says which.

with serving(make_served(tmp_path / "model", answers=["Hei!"])) as url:
    httpx.get(f"{url}/v1/models")
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripted_models import make_model

from normistral.artifact.manifest import Manifest, hash_files, read_manifest, write_manifest
from normistral.errors import EngineError
from normistral.runtime.engines.scripted import random_logits
from normistral.runtime.model import Model
from normistral.server.auth import Keys
from normistral.server.backends.base import BatchSettings
from normistral.server.limits import ServerLimits
from normistral.server.model_handler import ModelHandler

CONTEXT = 400
HELPERS = Path(__file__).parent


def make_served(
    folder: Path, *, answers: list[str] | None = None, pause_s: float = 0.0, fault: str = "", **changes
) -> Path:
    """A folder that looks like an artifact as far as a server looks.

    Args:
        answers: given one after the other in a conversation; None looks random, but depends on the tokens only.
        pause_s: that each step takes.
        fault: "load" fails to load; "crash TEXT" dies by SIGILL when a prompt holds the text; "bug TEXT" and "engine
            TEXT" raise.
        changes: fields of the manifest.
    """
    model = make_model(
        folder, answers or random_logits(1), context_length=changes.pop("context_length", CONTEXT), **changes
    )
    (folder / "script.json").write_text(json.dumps({"answers": answers, "pause_s": pause_s, "fault": fault}))
    write_manifest(folder, _describe(model, folder))
    return folder


def load(folder: Path, device: str = "CPU", *, exact: bool = False, settings=None) -> Model:
    """What `normistral.load` gives in the worker, and for comparing with it."""
    script = json.loads((folder / "script.json").read_text())
    kind, _, text = script["fault"].partition(" ")
    if kind == "load":
        raise EngineError("it would not load", "ask nicely")
    manifest = read_manifest(folder)
    logits = script["answers"] or random_logits(manifest.architecture.vocabulary)
    changes = {"reasoning": manifest.reasoning, "role": manifest.role, "sampling": manifest.sampling}
    if manifest.template is None:
        changes |= {"template": None, "adds_bos": True}
    model = make_model(folder / "again", logits, context_length=manifest.context_length, **changes)
    next_logits = model._backend.next_logits

    def slowly(token_ids):
        time.sleep(script["pause_s"])
        if text and text in model.tokenizer.decode(token_ids):
            if kind == "crash":
                os.kill(os.getpid(), signal.SIGILL)
            raise {"bug": RuntimeError, "engine": EngineError}[kind](f"it says {text}")
        return next_logits(token_ids)

    model._backend.next_logits = slowly
    return model


def open_served(folder: Path, limits: ServerLimits, **options) -> ModelHandler:
    batch = BatchSettings(
        "off",
        options.pop("cache_bytes", 2**20),
        limits.context_of(read_manifest(folder).context_length),
        options.pop("slots", None),
    )
    return ModelHandler.open(folder, batch, limits.new_tokens, **options)


@contextmanager
def serving(
    folder: Path, limits: ServerLimits | None = None, keys: Keys | None = None, wait_s: float = 60.0, **options
) -> Iterator[str]:
    """A server in this process with a worker process of its own; gives its URL."""
    # Not at the top: each worker process imports this file, and needs none of the web frameworks.
    from normistral.server.app import create_app
    from normistral.server.server import background_server

    limits = limits or ServerLimits(grace_s=0.2)
    app = create_app([open_served(folder, limits, **options)], limits, keys, worker_module="served_models")
    with background_server(app, wait_s) as url:
        yield url


def _describe(model: Model, folder: Path) -> Manifest:
    return dataclasses.replace(model.manifest, files=hash_files(folder))


def main() -> None:
    """Of the worker process."""
    import normistral.runtime.loading
    from normistral.server import worker

    normistral.runtime.loading.load = load
    worker.main()


def run_command(arguments: list[str]) -> int:
    """The real command line with such workers."""
    from normistral.cli import main as run
    from normistral.server import app

    create = app.create_app
    app.create_app = lambda *positional, **named: create(*positional, **named, worker_module="served_models")
    return run(arguments)


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:]))
