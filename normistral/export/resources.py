"""Disk and memory of an export: estimated before the start, measured during it.

It knows sizes, not models; each coefficient below names the measurement that it comes from.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from normistral.artifact.manifest import Architecture, Manifest
from normistral.errors import ResourceError
from normistral.export.quantize.plan import (
    CALIBRATION_TOKENS,
    SENSITIVITY_TOKENS,
    WINDOW_TOKENS,
    QuantPlan,
    choose_plan,
)
from normistral.export.recipe import Recipe, estimate_inner_bytes, estimate_weight_bytes, inner_weights
from normistral.hardware import available_memory_bytes, free_disk_bytes

# Python with torch, transformers, NNCF and OpenVINO, and the traced graph: 0.46 GB of anonymous memory after the
# conversion of an 8-layer model at the 7B's width, 0.1 GB of it for the graph.
_PROGRAM_BYTES = 350_000_000
_GRAPH_BYTES_PER_LAYER = 12_000_000
# Blocks of rows in float32, as they are read, rounded and written, several at a time.
_BLOCKS_BYTES = 256 * 2**20
# Tokenizers (once as they are, once as OpenVINO models), graph, configuration.
_SMALL_FILES_BYTES = 64 * 2**20
_RUNNING_SHARE = 1.6  # memory of a running artifact over its size on disk (benchmarks/load_memory.py: 1.2 to 1.5)
_SAMPLES_PER_S = 20
# Operations a second of one core over a whole calibration, its searches included (EPYC with AVX512 and bf16: a layer of
# the 7B's widths takes 114 s of one core without the correction), and in float32 products there: a slower core takes
# longer in proportion.
_CORE_OPERATIONS_PER_S = 85e9
_REFERENCE_PRODUCTS_PER_S = 105e9
_SHORT_S = 2.0  # a calibration beside which `measure_matmul` would take long: up to a second


@dataclass(frozen=True, slots=True)
class ResourceNeeds:
    """Bytes that an export takes beside the checkpoint.

    Attributes:
        disk: most that lies on OUTPUT's disk at one time, temporary files included.
        memory: most anonymous memory. The checkpoint is memory-mapped; its pages can be dropped and do not count.
    """

    disk: int
    memory: int


def estimate_needs(architecture: Architecture, recipe: Recipe, group_size: int | None) -> ResourceNeeds:
    """Estimate an export's disk and memory, without what the opened checkpoint puts on OUTPUT's disk."""
    stored = estimate_weight_bytes(architecture, recipe, group_size)
    widest_rows = max(architecture.vocabulary, architecture.feed_forward)
    disk = stored + _SMALL_FILES_BYTES
    memory = _PROGRAM_BYTES + _GRAPH_BYTES_PER_LAYER * architecture.layers
    if recipe.format == "onnx":
        # Written in blocks as they are read; a float matrix is turned round as a whole, in the type it is stored in.
        memory += _BLOCKS_BYTES
        if recipe.weights in ("fp16", "fp32"):
            memory += (2 if recipe.weights == "fp16" else 4) * widest_rows * architecture.hidden_size
    elif recipe.weights == "fp16":
        # Rounded into a file that is mapped like a checkpoint, then copied from there into the artifact.
        disk += stored
    else:
        # Rounded weights stay in memory until they are saved. One matrix at a time is there in float32 as well, twice
        # when it is rounded to int4 (8 layers of the 7B with a 4-bit output layer: 1.0 GB above the rest).
        in_groups = recipe.weights == "int8" and recipe.has_groups
        only_inner = recipe.output_layer_bits == 8 and not in_groups
        four_bits = architecture.feed_forward if only_inner else widest_rows
        memory += stored + max(4 * widest_rows, 8 * four_bits) * architecture.hidden_size
    plan = choose_plan(recipe, group_size)
    if recipe.format == "openvino" and recipe.weights == "int8" and recipe.has_groups:
        disk += stored  # all matrices wait in files of ours
    elif plan is not None:
        disk += estimate_inner_bytes(architecture, recipe, group_size)
        disk += 2 * _state_bytes(architecture, plan)  # those that are kept, and those before them
    if plan is not None:  # before anything is written
        memory = max(memory, _PROGRAM_BYTES + estimate_calibration_bytes(architecture, plan))
    return ResourceNeeds(disk, memory)


def estimate_calibration_bytes(architecture: Architecture, plan: QuantPlan) -> int:
    """Most memory of a calibration: a matrix, what flows through a layer, what GPTQ or the choice of 8 bits needs."""
    hidden, wide = architecture.hidden_size, architecture.feed_forward
    layer = 4 * inner_weights(architecture) // architecture.layers
    flowing = _state_bytes(architecture, plan)
    flowing += 4 * CALIBRATION_TOKENS * (hidden + 2 * wide)  # what a layer adds, and stands around the activation
    matrices = 3 * 4 * hidden * wide  # one is moved about as columns and given back as rows
    quantizing = flowing + matrices
    if plan.method == "gptq":
        quantizing += 2 * 4 * wide**2  # a Hessian and its Cholesky factor
    if plan.ratio == 1.0:
        return quantizing
    # Before that, the choice of what takes 8 bits: the states in front of every layer, a layer and its errors, and what
    # a window leaves for the way back, at the end as logits and their gradients.
    waiting = 4 * SENSITIVITY_TOKENS * hidden * architecture.layers
    window = 4 * WINDOW_TOKENS * max(3 * architecture.vocabulary, 8 * hidden + 6 * wide)
    return max(quantizing, waiting + 2 * layer + matrices + window)


def _state_bytes(architecture: Architecture, plan: QuantPlan) -> int:
    """Hidden states between two layers; with a correction, the checkpoint's own as well."""
    return 4 * CALIBRATION_TOKENS * architecture.hidden_size * (2 if plan.correction else 1)


def measure_matmul(cores: int) -> float:
    """Operations a second of one core in products of float32 matrices, now and with what else runs; takes 0.2 s."""
    import torch

    width = 2048
    matrix, times = torch.ones(width, width), []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - started)
    return 2 * width**3 / statistics.median(times[1:]) / cores  # the first one warms up


def estimate_calibration_s(
    architecture: Architecture, plan: QuantPlan, cores: int, products_per_s: float = _REFERENCE_PRODUCTS_PER_S
) -> float:
    """Roughly how long a calibration takes, in seconds: its passes, GPTQ's share, and that of the choice of 8 bits.

    Args:
        products_per_s: of one core, as `measure_matmul` gives it.
    """
    hidden, wide = architecture.hidden_size, architecture.feed_forward
    operations = 2.0 * CALIBRATION_TOKENS * inner_weights(architecture)
    if plan.ratio != 1.0:  # forward, once more forward, back, and each matrix's error
        operations += 8.0 * SENSITIVITY_TOKENS * inner_weights(architecture)
    if plan.method == "gptq":
        attention = architecture.heads * architecture.head_dim
        widths = (hidden, attention, hidden, wide)
        moments = sum(CALIBRATION_TOKENS * width**2 for width in widths)  # half of a symmetric matrix
        factors = sum(width**3 / 3 for width in widths)
        moved = inner_weights(architecture) / architecture.layers * 2 * max(hidden, attention)
        moved += 2 * hidden * wide * (wide - hidden)  # the last matrix has the wide inputs
        operations += architecture.layers * (moments + factors + moved)
        if plan.correction:  # the tokens through the layers once more, and what is solved for three inputs
            operations += 2.0 * CALIBRATION_TOKENS * inner_weights(architecture)
            solved = sum(CALIBRATION_TOKENS * width**2 + 3 * width**3 for width in widths[:3])
            corrected = inner_weights(architecture) / architecture.layers * max(hidden, attention)
            operations += architecture.layers * (solved + corrected)
    return operations / (_CORE_OPERATIONS_PER_S * cores * products_per_s / _REFERENCE_PRODUCTS_PER_S)


def predict_calibration_s(architecture: Architecture, plan: QuantPlan, cores: int) -> float:
    """`estimate_calibration_s` at this machine's measured speed; one of a few seconds is not worth the measurement."""
    seconds = estimate_calibration_s(architecture, plan, cores)
    if seconds < _SHORT_S:
        return seconds
    return estimate_calibration_s(architecture, plan, cores, measure_matmul(cores))


def check_tools_memory() -> None:
    """Refuse to start the tools where loading them alone would use the memory up, and the system end the process.

    Raises:
        ResourceError: too little memory, with the numbers.
    """
    available = available_memory_bytes()
    if available < _PROGRAM_BYTES:
        raise ResourceError(
            f"an export takes {_PROGRAM_BYTES / 1e9:.2f} GB of memory for its tools alone; "
            f"{available / 1e9:.2f} GB are available",
            "close other programs, raise the container's limit, or export on a larger machine",
        )


def check_resources(output: Path, needs: ResourceNeeds, if_fast: ResourceNeeds | None = None) -> None:
    """Refuse before the start what cannot end well.

    Args:
        if_fast: what the recipe "fast" would take instead, for a hint.

    Raises:
        ResourceError: too little free disk at `output` or too little memory, with the numbers.
    """
    free = free_disk_bytes(output)
    if free < needs.disk:
        raise ResourceError(
            f"this export needs about {needs.disk / 1e9:.2f} GB of disk at {output.absolute().parent}; "
            f"{free / 1e9:.2f} GB are free",
            "free some space, choose an OUTPUT on another disk, or smaller weights (int8, int4)",
        )
    available = available_memory_bytes()
    if available < needs.memory:
        hint = "close other programs, use smaller weights (int4), or export on a larger machine"
        if if_fast is not None and if_fast.memory <= available:
            hint = (
                "close other programs, export on a larger machine, or use --recipe fast: "
                f"it takes {if_fast.memory / 1e9:.2f} GB, and loses about twice as much of the model"
            )
        raise ResourceError(
            f"this export needs about {needs.memory / 1e9:.2f} GB of memory; {available / 1e9:.2f} GB are available",
            hint,
        )


def estimate_running_bytes(manifest: Manifest) -> int:
    """Memory that an artifact takes while it runs."""
    return int(manifest.total_bytes * _RUNNING_SHARE)


def estimate_layered_bytes(architecture: Architecture) -> int:
    """Memory of running a model layer by layer: the tools, and in float32 a layer, the embedding or the output layer.

    Layers of the 7B's widths: 1.26 GiB for the reference, 0.67 for the artifact (2026-11-30).
    """
    layer = inner_weights(architecture) // architecture.layers
    table = architecture.vocabulary * architecture.hidden_size
    tools = _PROGRAM_BYTES + _GRAPH_BYTES_PER_LAYER * architecture.layers
    return tools + 4 * max(layer, table) + _BLOCKS_BYTES


class MemoryMeter:
    """Measures this process and its children, 20 times a second, while the context is open.

    Attributes:
        peak_bytes: most anonymous memory seen: RssAnon + RssShmem + VmSwap of /proc/PID/status (proc(5)), summed.
            Mapped files are not in it. None on systems without /proc.
    """

    def __init__(self) -> None:
        self.peak_bytes = anonymous_bytes()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory meter", daemon=True)

    def __enter__(self) -> MemoryMeter:
        if self.peak_bytes is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _sample(self) -> None:
        while not self._stopping.wait(1 / _SAMPLES_PER_S):
            self.peak_bytes = max(self.peak_bytes or 0, anonymous_bytes() or 0)


def anonymous_bytes(process: str = "self") -> int | None:
    """Anonymous, shared and swapped memory of a process and its descendants; None without /proc, or if it has ended."""
    folder = Path("/proc") / process
    try:
        fields = [line.split() for line in (folder / "status").read_text().splitlines()]
        children = [child for task in (folder / "task").glob("*/children") for child in task.read_text().split()]
    except OSError:
        return None
    own = sum(1024 * int(row[1]) for row in fields if row[0] in ("RssAnon:", "RssShmem:", "VmSwap:"))
    return own + sum(anonymous_bytes(child) or 0 for child in children)
