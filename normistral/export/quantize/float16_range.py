"""Whether the types that an artifact stores can hold a checkpoint's values; float16 cannot hold all of bfloat16's.

OpenVINO's rounded weights are codes times scales in float16. A group of weights far below its matrix's others becomes
zeros, which is as near as the type comes; a whole matrix that would, or a scale beyond the range, is refused here,
before the first weight is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping

from normistral.errors import ExportError
from normistral.export.checkpoint.families.base import OUTPUT_LAYER
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.quantize.scheme import smallest_representable
from normistral.export.recipe import Recipe

LARGEST_FLOAT16 = 65504.0
_LARGEST = 2.0**126  # the distance of a lowest and a highest value has to be a float32
_RANGE = f"6e-08 to {LARGEST_FLOAT16:g}, in full precision from 6.1e-05"


def require_range(largest: Mapping[str, float], checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse weights that the recipe's stored types cannot hold.

    Args:
        largest: magnitude in every tensor, as `read_magnitudes` has it.

    Raises:
        ExportError: naming the tensor, its largest magnitude and the range.
    """
    for name, shape in checkpoint.tensor_shapes.items():
        value = largest[name]
        if value > _LARGEST:
            raise ExportError(
                f"{name} has values up to {value:.3g}, too large for sums in float32",
                "the checkpoint may be damaged: compare it with what its authors published",
            )
        bits = _stored_bits(name, len(shape), checkpoint, recipe)
        if bits is None or value == 0:
            continue
        part = "its weights" if bits == 16 else "the scales of its weights"
        if value > LARGEST_FLOAT16 * (1 if bits == 16 else 2 ** (bits - 1) - 1):
            problem = f"has values up to {value:.6g}, beyond the range of float16"
        elif value < smallest_representable(bits, float16=True) and not name.endswith(".bias"):
            problem = f"has no value above {value:.3g}, which is below the range of float16"
        else:
            continue
        raise ExportError(
            f"{name} {problem}, in which {recipe.format} {recipe.weights} stores {part} ({_RANGE})", _hint(recipe)
        )


def _stored_bits(name: str, dimensions: int, checkpoint: Checkpoint, recipe: Recipe) -> int | None:
    """4 or 8: the bits of codes whose scales are float16; 16: the weights themselves are; None: float16 has no part."""
    if recipe.format == "onnx":
        return 16 if recipe.weights == "fp16" else None
    if dimensions < 2:  # as in the checkpoint
        return 16 if checkpoint.dtype == "float16" else None
    if recipe.weights != "int4":
        return 16 if recipe.weights == "fp16" else 8
    if name not in (checkpoint.family.embedding, OUTPUT_LAYER):
        return 4 if recipe.ratio == 1 else 8
    if recipe.output_layer_bits == 4 and (name == OUTPUT_LAYER or checkpoint.config["tie_word_embeddings"]):
        return 4
    return None if recipe.backup == "fp" else 8


def _hint(recipe: Recipe) -> str:
    if recipe.format == "onnx":
        return "use --weights fp32, or int8 or int4, whose scales are float32 in ONNX"
    return "use --format onnx with int8 or int4, whose scales are float32 there, or with fp32"
