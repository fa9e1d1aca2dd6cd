"""genai_config.json, without which onnxruntime-genai does not open a model.

Its fields: onnxruntime-genai's src/config.h, as version 0.18 reads them.
"""

from __future__ import annotations

import json
from typing import Any

from normistral.artifact.manifest import Architecture, SamplingDefaults
from normistral.export.job import ExportJob
from normistral.export.onnx.signature import GRAPH_NAME

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
