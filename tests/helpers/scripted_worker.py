"""A bench worker with a scripted model behind every artifact; an artifact's name may say how its process goes wrong."""

import os
import signal
import tempfile
from pathlib import Path

from scripted_models import make_model
from tiny_models import VOCABULARY

import normistral.runtime.loading
from normistral.errors import EngineError
from normistral.evaluation.bench import worker
from normistral.runtime.engines.scripted import random_logits


def load(folder: Path, device: str = "CPU", *, exact: bool = False, settings=None):
    if folder.name == "refuses":
        raise EngineError("it would not", "ask nicely")
    if folder.name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if folder.name == "crashes":
        os.kill(os.getpid(), signal.SIGILL)
    if folder.name == "breaks":
        raise RuntimeError("a bug")
    print("an engine's own words")  # on the stream that answers go to
    with tempfile.TemporaryDirectory() as scratch:
        return make_model(Path(scratch) / "tokenizer", random_logits(VOCABULARY), context_length=400)


def main() -> None:
    normistral.runtime.loading.load = load
    worker.main()
