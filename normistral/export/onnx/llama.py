"""The fused graph of Llama and Mistral: one function per block, shapes beside each line.

Shapes as in blocks.py; F is the feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from normistral.artifact.manifest import Architecture
from normistral.errors import ExportError
from normistral.export.checkpoint.families.llama import LLAMA
from normistral.export.onnx.blocks import (
    SequenceLengths,
    WeightSchemes,
    activate,
    add_lengths,
    embed,
    group_query_attention,
    linear,
    output_layer,
)
from normistral.export.onnx.graph import MICROSOFT, Graph
from normistral.export.quantize.scheme import QuantScheme

_HEAD_DIM_STEP = 16  # GroupQueryAttention's rotary embedding refuses others


def write_decoder(
    graph: Graph, architecture: Architecture, config: dict[str, Any], storage: WeightSchemes, context: int
) -> None:
    """Add the whole decoder: input_ids, attention_mask, position_ids and past → logits and present.

    Args:
        config: sanitised config.json.
        context: positions of the rotary tables.
    """
    if architecture.head_dim % _HEAD_DIM_STEP:
        raise ExportError(
            f"the fused graph needs attention heads of a width that {_HEAD_DIM_STEP} divides, "
            f"not {architecture.head_dim}",
            "use --graph plain, with fp16 or fp32 weights",
        )
    shared = add_shared_inputs(graph, config, architecture, context)
    table, hidden = embed(graph, LLAMA.embedding, storage.embedding)  # [b, s, hidden]
    skip = ""
    for layer in range(architecture.layers):
        normed, skip = add_and_norm(graph, hidden, skip, f"model.layers.{layer}.input_layernorm", config)
        attended = attend(graph, normed, layer, architecture, storage.inner, shared)
        normed, skip = add_and_norm(graph, attended, skip, f"model.layers.{layer}.post_attention_layernorm", config)
        hidden = feed_forward(graph, normed, layer, config, storage.inner)
    normed, _ = add_and_norm(graph, hidden, skip, "model.norm", config)
    output_layer(graph, normed, architecture, storage.output, LLAMA.embedding, table)


@dataclass(frozen=True, slots=True)
class SharedInputs:
    """Names of the tensors that every layer's attention reads."""

    lengths: SequenceLengths
    padding: str  # [b, 1, s, t]: 0 where a token is, the lowest float where padding is
    rotary_tables: tuple[str, str]  # cosines and sines: [context, d/2]


def add_shared_inputs(graph: Graph, config: dict[str, Any], architecture: Architecture, context: int) -> SharedInputs:
    """Lengths, padding and the rotary tables.

    GroupQueryAttention counts positions itself, padding included: rotary attention depends on differences only. Of
    position_ids, its kernel for CPUs would take the first row's start for all rows in a prompt, and every row's own in
    the next steps.
    """
    lengths = add_lengths(graph)
    graph.constant("ones", np.array([1]))
    graph.node("Concat", ["ones", "ones", lengths.tokens_1d, lengths.total_1d], ["padding.shape"], axis=0)
    padding = graph.node("Expand", [lengths.padding_row, "padding.shape"], ["padding"])  # [b, 1, s, t]
    cosines, sines = rotary_tables(config, architecture.head_dim, context)
    return SharedInputs(lengths, padding, (graph.store("rotary.cos", cosines), graph.store("rotary.sin", sines)))


def rotary_tables(config: dict[str, Any], head_dim: int, context: int) -> tuple[Any, Any]:
    """Cosines and sines [context, head_dim/2] of every position's angles, as transformers computes them."""
    import torch
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = config["rope_scaling"]
    if scaling is None:
        frequencies = 1.0 / config["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        factor = 1.0
    else:
        shape = AutoConfig.for_model(**config)
        tensor, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](shape, torch.device("cpu"))
        frequencies = tensor.numpy()
    angles = np.arange(context, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
    return np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)


def add_and_norm(graph: Graph, x: str, skip: str, name: str, config: dict[str, Any]) -> tuple[str, str]:
    """x + skip, and its RMS norm: two times [b, s, hidden]. Without a skip, x stands for the sum."""
    gamma = graph.vector(f"{name}.weight")
    if not skip:
        normed = graph.node(
            "SimplifiedLayerNormalization",
            [x, gamma],
            [f"{name}.out"],
            axis=-1,
            epsilon=config["rms_norm_eps"],
            stash_type=1,
        )
        return normed, x
    outputs = [f"{name}.out", "", "", f"{name}.sum"]
    normed = graph.node(
        "SkipSimplifiedLayerNormalization", [x, skip, gamma], outputs, MICROSOFT, epsilon=config["rms_norm_eps"]
    )
    return normed, outputs[3]


def attend(
    graph: Graph, x: str, layer: int, architecture: Architecture, scheme: QuantScheme | None, shared: SharedInputs
) -> str:
    """Rotary grouped-query attention over past and new tokens, and its output projection: [b, s, hidden]."""
    name = f"model.layers.{layer}.self_attn"
    packed = project(graph, x, name, scheme)  # [b, s, (H + 2 K) d]
    attended = group_query_attention(
        graph, packed, name, layer, architecture, shared.lengths, shared.padding, shared.rotary_tables
    )
    return linear(graph, attended, f"{name}.o_proj", [f"{name}.o_proj"], scheme)


def project(graph: Graph, x: str, name: str, scheme: QuantScheme | None) -> str:
    """Queries, keys and values side by side: [b, s, (H + 2 K) d]. Neighbours on one grid are one product."""

    def scheme_of(kind: str) -> QuantScheme | None:
        return None if scheme is None else graph.scheme_of(f"{name}.{kind}_proj.weight", scheme)

    runs = ["".join(kinds) for _, kinds in groupby("qkv", key=scheme_of)]
    products = [linear(graph, x, f"{name}.{run}_proj", [f"{name}.{kind}_proj" for kind in run], scheme) for run in runs]
    return products[0] if len(runs) == 1 else graph.node("Concat", products, [f"{name}.qkv_proj.out"], axis=-1)


def feed_forward(graph: Graph, x: str, layer: int, config: dict[str, Any], scheme: QuantScheme | None) -> str:
    """down(act(gate(x)) * up(x)): [b, s, hidden]."""
    prefix = f"model.layers.{layer}.mlp"
    gate = linear(graph, x, f"{prefix}.gate_proj", [f"{prefix}.gate_proj"], scheme)  # [b, s, F]
    up = linear(graph, x, f"{prefix}.up_proj", [f"{prefix}.up_proj"], scheme)
    gated = graph.node("Mul", [activate(graph, gate, config["hidden_act"]), up], [f"{prefix}.gated"])
    return linear(graph, gated, f"{prefix}.down_proj", [f"{prefix}.down_proj"], scheme)
