"""Conversion to ONNX: which graph, which grids, the weights streamed into it, and genai_config.json.

It does not know what else an artifact holds.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from normistral.artifact.manifest import Architecture, SamplingDefaults
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor import WeightReader
from normistral.export.job import ExportJob
from normistral.export.onnx import bloom, llama
from normistral.export.onnx.blocks import WeightSchemes
from normistral.export.onnx.graph import ExternalData, Graph
from normistral.export.onnx.plain import write_plain
from normistral.export.onnx.signature import DATA_NAME, GRAPH_NAME, float_type, read_signature
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


# onnxruntime-genai opens no model without genai_config.json. Fields: its src/config.h, as version 0.18 reads them.

GENAI_NAME = "genai_config.json"


def write_genai_config(job: ExportJob) -> None:
    """Write the configuration of onnxruntime-genai into the artifact."""
    checkpoint, context = job.checkpoint, job.context_length
    config = checkpoint.config
    document = {
        "model": {
            "type": "decoder",
            "vocab_size": checkpoint.architecture.vocabulary,
            "context_length": context,
            "bos_token_id": checkpoint.bos_token_id,
            "eos_token_id": list(checkpoint.stop_token_ids),
            "pad_token_id": checkpoint.stop_token_ids[0] if config["pad_token_id"] is None else config["pad_token_id"],
            "decoder": describe_decoder(checkpoint.architecture),
        },
        "search": describe_search(checkpoint.sampling, context)
        # Past and present may be one buffer only for GroupQueryAttention, which then writes the new tokens alone.
        | {"past_present_share_buffer": job.recipe.graph_kind == "fused"},
    }
    (job.staging.artifact / GENAI_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def describe_decoder(architecture: Architecture) -> dict[str, Any]:
    """Shapes, and the names that Optimum gives inputs and outputs; %d is the layer."""
    positions = {"position_ids": "position_ids"} if architecture.positions == "rotary" else {}
    return {
        "filename": GRAPH_NAME,
        # Threads are left to onnxruntime-genai: what is best depends on the machine that runs it.
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "hidden_size": architecture.hidden_size,
        "head_size": architecture.head_dim,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "num_hidden_layers": architecture.layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **positions,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def describe_search(sampling: SamplingDefaults, context: int) -> dict[str, Any]:
    """The authors' sampling; greedy where they say nothing."""
    document: dict[str, Any] = {"max_length": context, "do_sample": bool(sampling.temperature)}
    if sampling.temperature:
        document |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    document["repetition_penalty"] = sampling.repetition_penalty
    return {key: value for key, value in document.items() if value is not None}
