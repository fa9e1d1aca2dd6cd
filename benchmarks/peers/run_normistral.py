"""An artifact of ours, of either format, through the engine that `normistral.load` makes.

python run_normistral.py ARTIFACT
"""

from __future__ import annotations

from pathlib import Path

from serve import Settings, serve

import normistral


class NormistralRunner:
    """The engine under the decode loop: no sampling and no text, as for the other libraries."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        if settings:
            raise SystemExit("error: normistral plans its settings by itself")
        self.backend = normistral.load(folder)._backend
        self.engine = self.backend.create_engine()
        self.next_id = 0

    def describe(self) -> Settings:
        capabilities = self.backend.capabilities
        return {
            "library": f"normistral {normistral.__version__} ({capabilities.name})",
            "prefill_chunk": str(capabilities.prefill_chunk),
            **capabilities.settings,
        }

    def prefill(self, token_ids: list[int]) -> None:
        self.engine.reset()
        chunk = self.backend.capabilities.prefill_chunk
        for start in range(0, len(token_ids), chunk):
            logits = self.engine.forward(token_ids[start : start + chunk])
        self.next_id = int(logits[-1].argmax())

    def decode_step(self) -> None:
        self.next_id = int(self.engine.forward([self.next_id])[-1].argmax())


if __name__ == "__main__":
    serve(NormistralRunner)
