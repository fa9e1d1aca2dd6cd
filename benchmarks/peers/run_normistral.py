"""An artifact of ours, of either format, through the engine that `normistral.load` makes.

python run_normistral.py ARTIFACT [setting=value ...]      settings of the engine, over the plan for this machine
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from worker import Settings, Trace, serve, step_by_step

import normistral


class NormistralRunner:
    """The engine under the decode loop: no sampling and no text, as for the other libraries."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        given: dict[str, Any] = {"settings": settings} if settings else {}
        self.backend = normistral.load(folder, **given)._backend
        self.engine = self.backend.create_engine()

    def describe(self) -> Settings:
        capabilities = self.backend.capabilities
        engine = f"{capabilities.name} {version(capabilities.name)}"
        library = f"normistral {normistral.__version__}, {engine}"
        return {"library": library, "prefill_chunk": str(capabilities.prefill_chunk), **capabilities.settings}

    def generate(self, token_ids: list[int], count: int, trace: Trace) -> None:
        self.engine.reset()
        step_by_step(self.feed, token_ids, count, trace)

    def feed(self, token_ids: list[int]) -> int:
        chunk = self.backend.capabilities.prefill_chunk
        for start in range(0, len(token_ids), chunk):
            logits = self.engine.forward(token_ids[start : start + chunk])
        return int(logits[-1].argmax())


if __name__ == "__main__":
    serve(NormistralRunner)
