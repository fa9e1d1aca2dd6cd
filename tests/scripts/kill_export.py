"""Kill exports at random moments and look at what is left.

    python tests/scripts/kill_export.py MODEL --kills 50 --seed 1 --format onnx --weights int4

A process that has imported everything forks one export per kill, so that the moments fall into the export itself and
not into imports. Half of the kills hit a first export, half one that replaces an old artifact (--force). After each:

- whatever has a manifest, under any name, is whole: every file is there with its SHA-256;
- an old artifact is still there, unchanged, or replaced by the whole new one;
- the next export succeeds, and leaves nothing but OUTPUT.

Prints one line of JSON; exits with 1 at the first violation.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from normistral.artifact.manifest import MANIFEST_NAME, check_files, read_manifest
from normistral.export.pipeline import export_model
from normistral.export.quantize import plan
from normistral.export.tools import require_export_tools
from normistral.telemetry import silence_telemetry


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--format", default="openvino")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--recipe", default=None)
    parser.add_argument("--calibration-tokens", type=int, default=None, help="fewer make the export shorter")
    parser.add_argument("--recover-every", type=int, default=1, help="a whole export after every n-th kill")
    options = parser.parse_args()
    if options.calibration_tokens is not None:
        plan.CALIBRATION_TOKENS = options.calibration_tokens
    silence_telemetry()
    require_export_tools(options.format)
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out"
        # The first one may be slower: caches are cold.
        seconds = min(run_whole(options, output, force=force) for force in (False, True))
        tally = {"killed": 0, "finished": 0, "replaced": 0, "partial_left": 0, "recoveries": 0}
        for number in range(options.kills):
            force = number < options.kills // 2  # first over the old artifact that is there, then without one
            if not force and output.exists():
                shutil.rmtree(output)
            old = (output / MANIFEST_NAME).read_bytes() if force else None
            # Every other kill goes to the end of the export, where names change.
            moment = moments.uniform(*((0.85, 1.1) if number % 2 else (0.0, 1.0))) * seconds
            killed = kill_after(options, output, moment, force=force)
            tally["killed" if killed else "finished"] += 1
            tally["partial_left"] += any(path.name.startswith(".out.partial-") for path in output.parent.iterdir())
            tally["replaced"] += inspect_remains(output, old)
            if (number + 1) % options.recover_every == 0:
                run_whole(options, output, force=output.exists())
                tally["recoveries"] += 1
        print(
            json.dumps(
                {
                    "model": Path(options.model).name,
                    "format": options.format,
                    "seed": options.seed,
                    "export_s": round(seconds, 1),
                    **tally,
                }
            )
        )
    return 0


def run_whole(options: argparse.Namespace, output: Path, *, force: bool) -> float:
    """One export to its end; seconds."""
    started = time.monotonic()
    _, status = os.waitpid(fork_export(options, output, force=force), 0)
    assert status == 0, f"an export after a kill failed with status {status}"
    check_files(output, read_manifest(output), thorough=True)
    left = [path.name for path in output.parent.iterdir() if path.name.startswith(".")]
    assert not left, f"a whole export left {left}"
    return time.monotonic() - started


def kill_after(options: argparse.Namespace, output: Path, seconds: float, *, force: bool) -> bool:
    """Start an export and kill it; False if it had ended before."""
    child = fork_export(options, output, force=force)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the export failed by itself with status {status}"
    return status != 0


def fork_export(options: argparse.Namespace, output: Path, *, force: bool) -> int:
    child = os.fork()
    if child:
        return child
    try:
        export_model(options.model, output, options.format, options.weights, recipe=options.recipe, force=force)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def inspect_remains(output: Path, old: bytes | None) -> bool:
    """Whether an old artifact, given by its manifest, was replaced.

    Raises:
        AssertionError, ArtifactError: something looks whole and is not, or the old artifact is damaged or lost.
    """
    for manifest in output.parent.rglob(MANIFEST_NAME):
        check_files(manifest.parent, read_manifest(manifest.parent), thorough=True)
    if output.exists():
        assert (output / MANIFEST_NAME).exists(), "OUTPUT exists without a manifest"
    if old is None:
        return False
    assert output.exists(), "the old artifact is lost"
    return (output / MANIFEST_NAME).read_bytes() != old


if __name__ == "__main__":
    sys.exit(main())
