"""What is worth trying on a machine: for each engine, stages of settings that are searched one after the other.

Pure. One stage after the other and not all together, because a stage's best hardly depends on the others' (the
arithmetic decides between compute and memory; threads and pieces of the prompt come on top), and because every try
costs a load. Figures are in docs/decisions.md, "OpenVINO settings".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from normistral import hardware
from normistral.artifact.manifest import Manifest
from normistral.hardware import Machine, plan_threads
from normistral.runtime.engines.settings import DEFAULT_CHUNK, ENGINES_KERNEL, INT4_KERNEL, OUR_KERNEL, PREFILL_CHUNK
from normistral.tuning.work import Work

Settings = Mapping[str, str]

# What an engine chooses where nobody does, and what is varied here: the search begins with it.
REPORTED = frozenset(
    {"INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "KV_CACHE_PRECISION", "ENABLE_CPU_PINNING"}
    | {"accuracy_level", INT4_KERNEL}
)
_CHUNKS = (64, 128, 256, 512, 1024)
_GROUPS = ("32", "64", "128")


@dataclass(frozen=True, slots=True)
class Stage:
    """Some settings that are varied together.

    Attributes:
        name: for people.
        variants: each is to be laid over the best so far.
    """

    name: str
    variants: tuple[dict[str, str], ...]


def rule_settings(machine: Machine, manifest: Manifest) -> dict[str, str]:
    """What `load` would use without a tuning, and where the search begins."""
    if manifest.format == "openvino":
        plan = hardware.plan_openvino(machine, manifest.recipe.weights)
    else:
        plan = hardware.plan_onnxruntime(machine)
    return {**plan, PREFILL_CHUNK: DEFAULT_CHUNK}


def exact_arithmetic(machine: Machine, manifest: Manifest) -> dict[str, str]:
    """The settings that decide about results, as `exact` has them: the way back where a rule costs too much."""
    if manifest.format == "openvino":
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        exact = hardware.exact_openvino(machine)
        ours = {INT4_KERNEL: ENGINES_KERNEL} if manifest.recipe.weights == "int4" else {}
        return {name: exact[name] for name in names} | ours
    return {"accuracy_level": "1"} if _has_rounded_products(manifest) else {}


def plan_search(machine: Machine, manifest: Manifest, work: Work, start: Settings) -> list[Stage]:
    """The stages for an artifact on a machine, the most telling first; those with nothing to vary are left out.

    Args:
        start: where the search begins.
    """
    if manifest.format == "openvino":
        stages = [_kernel_stage(start), *_openvino_stages(machine, manifest)]
    else:
        stages = _onnx_stages(machine, manifest)
    stages.append(Stage("prefill chunk", _chunks(work)))
    return [stage for stage in stages if stage.variants]


def _kernel_stage(start: Settings) -> Stage:
    """OpenVINO's products of int4 weights, where ours serve."""
    return Stage("int4 kernel", ({INT4_KERNEL: ENGINES_KERNEL},) if start.get(INT4_KERNEL) == OUR_KERNEL else ())


def _openvino_stages(machine: Machine, manifest: Manifest) -> list[Stage]:
    sets = machine.instruction_sets
    precisions = ["f32"]
    if sets & {"avx512_bf16", "amx_bf16", "bf16"}:
        precisions.append("bf16")
    if sets & {"avx512_fp16", "amx_fp16", "asimdhp"}:
        precisions.append("f16")
    groups = ["0"]
    # Activations are only quantised for weights that are, and pay only where int8 dot products are. Where nothing is
    # known of a machine, everything is tried.
    if manifest.recipe.weights in ("int4", "int8") and (not sets or sets & hardware.INT8_DOT_PRODUCT):
        groups += _GROUPS
    arithmetic = [
        {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
        for precision in precisions
        for group in groups
        if precision == "f32" or group in ("0", "64")  # next to half floats, the size of the groups matters less
    ]
    caches = [{"KV_CACHE_PRECISION": precision} for precision in ("u8", *precisions)]
    threads = [
        {"INFERENCE_NUM_THREADS": str(count)}
        | ({"ENABLE_HYPER_THREADING": "YES"} if count > machine.physical_cores else {})
        for count in _thread_counts(machine)
    ]
    return [
        Stage("arithmetic", tuple(arithmetic)),
        Stage("threads", (*threads, {"ENABLE_CPU_PINNING": "NO"})),
        Stage("KV cache", tuple(caches)),
    ]


def _onnx_stages(machine: Machine, manifest: Manifest) -> list[Stage]:
    levels = [{"accuracy_level": level} for level in ("1", "4")] if _has_rounded_products(manifest) else []
    threads = [{"intra_op_num_threads": str(count)} for count in _thread_counts(machine)]
    spinning = [{"session.intra_op.allow_spinning": switch} for switch in ("0", "1")]
    return [
        Stage("arithmetic", tuple(levels)),
        Stage("threads", tuple(threads)),
        Stage("spinning", tuple(spinning)),
    ]


def _has_rounded_products(manifest: Manifest) -> bool:
    return manifest.recipe.graph == "fused" and manifest.recipe.weights in ("int4", "int8")


def _thread_counts(machine: Machine) -> Sequence[int]:
    """Beside the rule's: one for somebody else, half of the cores, and every hyper-thread unless a quota forbids it."""
    planned = plan_threads(machine)
    counts = {planned - 1, machine.physical_cores // 2, machine.physical_cores}
    if machine.cpu_quota is None:
        counts.add(machine.logical_cpus)
    else:
        counts |= {int(machine.cpu_quota), int(machine.cpu_quota) + 1}
        counts = {count for count in counts if count <= machine.physical_cores}
    return sorted(count for count in counts if count >= 1 and count != planned)


def _chunks(work: Work) -> tuple[dict[str, str], ...]:
    """Sizes that cut this prompt differently: from the first that takes all of it, larger ones are the same."""
    enough = next((size for size in _CHUNKS if size >= work.prompt), _CHUNKS[-1])
    return tuple({PREFILL_CHUNK: str(size)} for size in _CHUNKS if size <= enough)
