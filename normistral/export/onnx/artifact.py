"""Conversion to ONNX: which graph, which grids, and the weights streamed into it.

It does not know what else an artifact holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from onnx import TensorProto

from normistral.artifact.presets import WeightFormat
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor_reader import WeightReader
from normistral.export.onnx import bloom, llama
from normistral.export.onnx.blocks import Storage
from normistral.export.onnx.graph import DATA_NAME, ExternalData, Graph
from normistral.export.onnx.plain import write_plain
from normistral.export.onnx.signature import read_signature
from normistral.export.quantize.scheme import Grid
from normistral.export.quantize.tensor_store import RoundedTables
from normistral.export.recipe import Recipe
from normistral.export.reference.model import Reference, compute_reference, fits_for_running, load_reference
from normistral.export.staging import Staging
from normistral.progress import Progress, Stage

_WRITERS = {"llama": llama.write_decoder, "mistral": llama.write_decoder, "bloom": bloom.write_decoder}  # by model_type


def write_model(
    checkpoint: Checkpoint,
    recipe: Recipe,
    group_size: int | None,
    context: int,
    staging: Staging,
    token_ids: list[int],
    tables: RoundedTables | None,
    progress: Progress,
) -> Reference | None:
    """Write model.onnx and model.onnx.data, never holding more of the model than the rows at work.

    Args:
        context: the most tokens that the artifact is for.
        tables: matrices that are rounded already.

    Returns:
        what the model itself computes for `token_ids`, or None when it is too large to run.
    """
    reference = None
    if fits_for_running(checkpoint.architecture):
        with progress.stage("running the model for comparison"):
            reference = compute_reference(load_reference(checkpoint), token_ids)
    with progress.stage(f"writing the {recipe.graph_kind} graph", checkpoint.weight_bytes, "bytes") as writing:
        if recipe.graph_kind == "fused":
            write_fused(
                checkpoint,
                recipe.weights,
                choose_storage(recipe, group_size, checkpoint),
                context,
                staging.artifact,
                tables,
                writing,
            )
        else:
            dtype: Literal["float16", "float32"] = "float16" if recipe.weights == "fp16" else "float32"
            write_plain(checkpoint, staging.artifact, dtype, writing)
    return reference


def write_fused(
    checkpoint: Checkpoint,
    weights: WeightFormat,
    storage: Storage,
    context: int,
    folder: Path,
    tables: RoundedTables | None,
    stage: Stage,
) -> None:
    """The graph of onnxruntime's own operators.

    Args:
        tables: matrices that are rounded already; the others are rounded to nearest.
        stage: advanced by the stored bytes of each tensor that was read.

    Raises:
        ExportError: the graph cannot hold this model.
        CheckpointError: the weights cannot be read.
    """
    from transformers import AutoConfig

    reader = WeightReader(checkpoint.tensors)
    config, architecture, floats = checkpoint.config, checkpoint.architecture, float_type(weights)
    signature = read_signature(AutoConfig.for_model(**config), architecture, floats)
    with ExternalData(folder / DATA_NAME) as data:
        graph = Graph(reader, data, stage, floats, tables)
        _WRITERS[checkpoint.family.model_type](graph, architecture, config, storage, context)
        graph.save(folder, signature)


def float_type(weights: WeightFormat) -> int:
    """TensorProto.DataType of keys, values and logits."""
    return TensorProto.FLOAT16 if weights == "fp16" else TensorProto.FLOAT


def choose_storage(recipe: Recipe, group_size: int | None, checkpoint: Checkpoint) -> Storage:
    """The grids of a recipe: the embedding is stored like the layers that are not int4, or like what is tied to it."""
    if group_size is None:
        return Storage(None, None, None)
    inner = Grid(4 if recipe.weights == "int4" else 8, group_size, recipe.is_symmetric)
    if recipe.weights == "int8":
        return Storage(inner, inner, inner)
    backup = None if recipe.backup == "fp" else Grid(8, group_size, recipe.backup == "int8_sym")
    output = inner if recipe.output_layer_bits == 4 else backup
    return Storage(inner, output, output if checkpoint.architecture.tied_embeddings else backup)
