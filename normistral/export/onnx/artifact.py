"""Conversion to ONNX: which graph, which grids, and the weights streamed into it.

It does not know what else an artifact holds.
"""

from __future__ import annotations

from typing import Literal

from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor_reader import WeightReader
from normistral.export.job import ExportJob
from normistral.export.onnx import bloom, llama
from normistral.export.onnx.blocks import WeightSchemes
from normistral.export.onnx.graph import ExternalData, Graph
from normistral.export.onnx.plain import write_plain
from normistral.export.onnx.signature import DATA_NAME, float_type, read_signature
from normistral.export.quantize.scheme import QuantScheme
from normistral.export.quantize.tensor_store import QuantizedTensorStore
from normistral.export.recipe import Recipe
from normistral.progress import Stage

_WRITERS = {"llama": llama.write_decoder, "mistral": llama.write_decoder, "bloom": bloom.write_decoder}  # by model_type


def write_model(job: ExportJob, quantized: QuantizedTensorStore | None) -> None:
    """Write model.onnx and model.onnx.data; never more of the model in memory than the rows at work.

    Args:
        quantized: matrices that a calibration has quantized already; the others are rounded to nearest.

    Raises:
        ExportError: the graph cannot hold this model.
        CheckpointError: the weights cannot be read.
    """
    recipe, total = job.recipe, job.checkpoint.weight_bytes
    with job.progress.stage(f"writing the {recipe.graph_kind} graph", total, "bytes") as writing:
        if recipe.graph_kind == "fused":
            write_fused(job, quantized, writing)
        else:
            dtype: Literal["float16", "float32"] = "float16" if recipe.weights == "fp16" else "float32"
            write_plain(job.checkpoint, job.staging.artifact, dtype, writing)


def write_fused(job: ExportJob, quantized: QuantizedTensorStore | None, stage: Stage) -> None:
    """Write the graph of onnxruntime's own operators; `stage` is advanced by the stored bytes of each tensor read."""
    from transformers import AutoConfig

    checkpoint, folder = job.checkpoint, job.staging.artifact
    config, architecture, floats = checkpoint.config, checkpoint.architecture, float_type(job.recipe.weights)
    signature = read_signature(AutoConfig.for_model(**config), architecture, floats)
    storage = choose_schemes(job.recipe, job.group_size, checkpoint)
    with ExternalData(folder / DATA_NAME) as data:
        graph = Graph(WeightReader(checkpoint.tensors), data, stage, floats, quantized)
        _WRITERS[checkpoint.family.model_type](graph, architecture, config, storage, job.context_length)
        graph.save(folder, signature)


def choose_schemes(recipe: Recipe, group_size: int | None, checkpoint: Checkpoint) -> WeightSchemes:
    """The grids of a recipe: the embedding is stored like the layers that are not int4, or like what is tied to it."""
    if group_size is None:
        return WeightSchemes(None, None, None)
    inner = QuantScheme(4 if recipe.weights == "int4" else 8, group_size, recipe.is_symmetric)
    if recipe.weights == "int8":
        return WeightSchemes(inner, inner, inner)
    backup = None if recipe.backup == "fp" else QuantScheme(8, group_size, recipe.backup == "int8_sym")
    output = inner if recipe.output_layer_bits == 4 else backup
    return WeightSchemes(inner, output, output if checkpoint.architecture.tied_embeddings else backup)
