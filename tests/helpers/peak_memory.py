"""Peak memory of the calibration passes for 2 and for 14 layers, in a process of its own.

The allocator keeps freed memory as it likes, and more of it in a process where other tests ran before (up to 180 MB
were seen). Here every large block is a mapping that goes back to the system when it is freed, so figures repeat.

    python tests/helpers/peak_memory.py FOLDER    (for what it writes)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

WINDOW = np.random.default_rng(0).integers(5, 200, 48).tolist()
# A layer has 4.2 MB in float32: twelve more are 50 MB.
SHAPE = {"hidden": 256, "heads": 4, "kv_heads": 4, "head_dim": 64, "feed_forward": 1024, "dtype": "bfloat16"}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_ARENA_MAX": "1"}  # mallopt(3)


def peak_bytes(folder: Path) -> dict[str, dict[int, int]]:
    """Bytes at the peak of rounding layers and of measuring their sensitivity, by the number of layers."""
    command = [sys.executable, __file__, str(folder)]
    ran = subprocess.run(command, env=os.environ | MALLOC, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return {
        work: {int(layers): peak for layers, peak in found.items()} for work, found in json.loads(ran.stdout).items()
    }


def main(folder: Path) -> None:
    from tiny_models import make_llama

    from normistral.export.checkpoint.locate import locate
    from normistral.export.checkpoint.open import open_checkpoint
    from normistral.export.quantize.calibrate import quantize_layers
    from normistral.export.quantize.plan import QuantPlan
    from normistral.export.quantize.sensitivity import measure_sensitivity
    from normistral.export.quantize.tensor_store import QuantizedTensorStore
    from normistral.export.resources import MemoryMeter
    from normistral.progress import NoProgress, Uncounted

    def round_layers(checkpoint, scratch):
        plan = QuantPlan("scale_search", 4, 64, symmetric=True)
        quantize_layers(checkpoint, plan, [WINDOW], QuantizedTensorStore(scratch), Uncounted())

    def sensitivity(checkpoint, scratch):
        measure_sensitivity(
            checkpoint, QuantPlan("scale_search", 4, 64, symmetric=True, ratio=0.5), [WINDOW], Uncounted()
        )

    models = {layers: make_llama(folder / f"model-{layers}", layers=layers, **SHAPE) for layers in (2, 14)}
    peaks = {}
    for work in (round_layers, sensitivity):
        for layers in (2, 2, 14):  # the first run imports and warms up
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                located = locate(str(models[layers]), progress=NoProgress())
                checkpoint = open_checkpoint(located, Path(scratch), progress=NoProgress())
                with MemoryMeter() as meter:
                    before = meter.peak_bytes or 0
                    work(checkpoint, Path(scratch))
            peaks.setdefault(work.__name__, {})[layers] = (meter.peak_bytes or 0) - before
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
