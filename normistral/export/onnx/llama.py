"""The fused graph of Llama and Mistral: one function per block, the shape of what flows beside each line.

Shapes: b sequences of s tokens, t = past + s; H heads, K KV heads of width d; F the feed-forward width.
Operators outside the ONNX standard are onnxruntime's (ContribOperators.md in its repository).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from normistral.errors import ExportError
from normistral.export.onnx.graph import MICROSOFT, Graph, Table
from normistral.export.onnx.rounding import Grid
from normistral.manifest import Architecture

EMBEDDING = "model.embed_tokens.weight"
FAST_LEVEL = 4  # MatMulNBits' accuracy_level: activations rounded to int8 in blocks, products in int8
_HEAD_DIM_STEP = 16  # GroupQueryAttention's rotary embedding refuses others


@dataclass(frozen=True, slots=True)
class Storage:
    """How matrices are stored; None is as floats.

    Attributes:
        inner: attention and feed-forward.
        output, embedding: of a tied model they are one matrix, and one choice.
    """

    inner: Grid | None
    output: Grid | None
    embedding: Grid | None


def write_decoder(
    graph: Graph, architecture: Architecture, config: dict[str, Any], storage: Storage, context: int
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
    shared = share_inputs(graph, config, architecture, context)
    table, hidden = embed(graph, storage.embedding)  # [b, s, hidden]
    skip = ""
    for layer in range(architecture.layers):
        normed, skip = add_and_norm(graph, hidden, skip, f"model.layers.{layer}.input_layernorm", config)
        attended = attend(graph, normed, layer, architecture, config, storage.inner, shared)
        normed, skip = add_and_norm(graph, attended, skip, f"model.layers.{layer}.post_attention_layernorm", config)
        hidden = feed_forward(graph, normed, layer, architecture, config, storage.inner)
    normed, _ = add_and_norm(graph, hidden, skip, "model.norm", config)
    output_layer(graph, normed, architecture, storage.output, table)


@dataclass(frozen=True, slots=True)
class SharedInputs:
    """What every layer's attention reads: names of tensors."""

    last_position: str  # int32 [b]: index of the last token
    total: str  # int32 []: t
    cosines: str  # [context, d/2]
    sines: str
    padding: str  # [b, 1, s, t]: 0 where a token is, the lowest float where padding is


def share_inputs(graph: Graph, config: dict[str, Any], architecture: Architecture, context: int) -> SharedInputs:
    """Lengths and padding from the attention mask, and the rotary tables.

    Padded sequences count as long as the batch and their padding is masked: GroupQueryAttention takes lengths that are
    shorter for padding on the right, and generation pads on the left. For the same reason it counts positions itself,
    padding included: rotary attention depends on differences only. Of position_ids, its kernel for CPUs would take the
    first row's start for all rows in a prompt, and every row's own in the next steps.
    """
    graph.constant("axis.1", np.array(1, np.int64))
    graph.constant("one.int32", np.array(1, np.int32))
    graph.node("Shape", ["attention_mask"], ["mask.shape"])  # [b, t]
    graph.node("Gather", ["mask.shape", "axis.1"], ["total.int64"])  # t
    total = graph.node("Cast", ["total.int64"], ["total"], to=TensorProto.INT32)
    graph.node("Sub", [total, "one.int32"], ["total.last"])
    for index in range(3):
        graph.constant(f"range.{index}", np.array([index]))
    graph.node("Slice", ["mask.shape", "range.0", "range.1"], ["batch"])  # [b]
    last = graph.node("Expand", ["total.last", "batch"], ["last_position"])  # [b]

    graph.node("Cast", ["attention_mask"], ["mask.float"], to=graph.float_type)
    graph.constant("one.float", np.array(1, graph.float_dtype))
    graph.constant("lowest", np.array(np.finfo(graph.float_dtype).min, graph.float_dtype))
    graph.node("Sub", ["one.float", "mask.float"], ["mask.padded"])
    graph.node("Mul", ["mask.padded", "lowest"], ["mask.bias"])  # [b, t]
    graph.node("Unsqueeze", ["mask.bias", graph.constant("axes.1.2", np.array([1, 2]))], ["mask.row"])  # [b, 1, 1, t]
    graph.node("Shape", ["input_ids"], ["ids.shape"])
    graph.node("Slice", ["ids.shape", "range.1", "range.2"], ["tokens"])  # [s]
    graph.node("Slice", ["mask.shape", "range.1", "range.2"], ["total.1d"])  # [t]
    graph.constant("ones", np.array([1]))
    graph.node("Concat", ["ones", "ones", "tokens", "total.1d"], ["padding.shape"], axis=0)
    padding = graph.node("Expand", ["mask.row", "padding.shape"], ["padding"])  # [b, 1, s, t]

    cosines, sines = rotary_tables(config, architecture.head_dim, context)
    return SharedInputs(
        last,
        total,
        graph.store("rotary.cos", cosines),
        graph.store("rotary.sin", sines),
        padding,
    )


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


def embed(graph: Graph, grid: Grid | None) -> tuple[Table | None, str]:
    """Rows of the embedding for the token ids: [b, s, hidden]."""
    name = EMBEDDING
    if grid is None:
        return None, graph.node("Gather", [graph.matrix(name, [name], transposed=False), "input_ids"], ["embedded"])
    table = graph.table(name, [name], grid)
    rows, columns = graph.reader.shape(name)
    codes = graph.view(table.codes, f"{name}.rows", (rows, grid.code_bytes(columns)))
    inputs = [codes, "input_ids", graph.use(table.scales), graph.use(table.zero_points)]
    embedded = graph.node(
        "GatherBlockQuantized",
        trim(inputs),
        ["embedded"],
        MICROSOFT,
        bits=grid.bits,
        block_size=grid.group_size,
        gather_axis=0,
        quantize_axis=1,
    )
    return table, embedded


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
    graph: Graph,
    x: str,
    layer: int,
    architecture: Architecture,
    config: dict[str, Any],
    grid: Grid | None,
    shared: SharedInputs,
) -> str:
    """Rotary grouped-query attention over past and new tokens, and its output projection: [b, s, hidden]."""
    prefix = f"model.layers.{layer}.self_attn"
    projections = [f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"]
    packed = linear(graph, x, f"{prefix}.qkv_proj", projections, grid)  # [b, s, (H + 2 K) d]
    past = [past_input(graph, f"past_key_values.{layer}.{kind}", architecture) for kind in ("key", "value")]
    outputs = [f"{prefix}.out", f"present.{layer}.key", f"present.{layer}.value"]  # [b, s, H d]; twice [b, K, t, d]
    attended = graph.node(
        "GroupQueryAttention",
        [
            packed,
            "",
            "",
            *past,
            shared.last_position,
            shared.total,
            shared.cosines,
            shared.sines,
            "",  # positions count from the first column: see share_inputs
            shared.padding,
        ],
        outputs,
        MICROSOFT,
        num_heads=architecture.heads,
        kv_num_heads=architecture.kv_heads,
        scale=float(architecture.head_dim**-0.5),
        local_window_size=-1 if architecture.sliding_window is None else architecture.sliding_window,
        do_rotary=1,
        rotary_interleaved=0,
    )
    return linear(graph, attended, f"{prefix}.o_proj", [f"{prefix}.o_proj"], grid)


def past_input(graph: Graph, name: str, architecture: Architecture) -> str:
    """A past tensor [b, K, past, d]; an empty one of another width, which ORTModelForCausalLM passes, is mended."""
    if architecture.head_dim * architecture.heads == architecture.hidden_size:
        return name
    shape = np.array([0, 0, 0, architecture.head_dim])  # 0 is: as it comes
    return graph.node("Reshape", [name, graph.constant(f"{name}.shape", shape)], [f"{name}.mended"])


def feed_forward(
    graph: Graph, x: str, layer: int, architecture: Architecture, config: dict[str, Any], grid: Grid | None
) -> str:
    """down(act(gate(x)) * up(x)): [b, s, hidden]."""
    prefix = f"model.layers.{layer}.mlp"
    gate = linear(graph, x, f"{prefix}.gate_proj", [f"{prefix}.gate_proj"], grid)  # [b, s, F]
    up = linear(graph, x, f"{prefix}.up_proj", [f"{prefix}.up_proj"], grid)
    gated = graph.node("Mul", [activate(graph, gate, config["hidden_act"]), up], [f"{prefix}.gated"])
    return linear(graph, gated, f"{prefix}.down_proj", [f"{prefix}.down_proj"], grid)


def activate(graph: Graph, x: str, kind: str) -> str:
    """The activation of config.json's `hidden_act`: same shape."""
    output = f"{x}.activated"
    if kind == "silu":  # x * sigmoid(x)
        return graph.node("QuickGelu", [x], [output], MICROSOFT, alpha=1.0)
    if kind == "relu":
        return graph.node("Relu", [x], [output])
    if kind == "gelu":
        return graph.node("Gelu", [x], [output], MICROSOFT)
    return graph.node("FastGelu", [x], [output], MICROSOFT)  # gelu_new, gelu_pytorch_tanh


def output_layer(graph: Graph, x: str, architecture: Architecture, grid: Grid | None, embedding: Table | None) -> None:
    """Logits [b, s, vocabulary]; a tied output layer reads the embedding's own bytes."""
    if not architecture.tied_embeddings:
        linear(graph, x, "lm_head", ["lm_head"], grid, output="logits")
    elif embedding is not None:
        multiply(graph, x, embedding, "", architecture.hidden_size, architecture.vocabulary, "logits")
    else:
        multiply_by_embedding(graph, x, architecture, "logits")


def multiply_by_embedding(graph: Graph, x: str, architecture: Architecture, output: str) -> str:
    """x [b, s, hidden] times the float embedding [vocabulary, hidden], which Gemm reads as it is stored."""
    rows = graph.constant(f"{output}.rows", np.array([-1, architecture.hidden_size]))
    flat = graph.node("Reshape", [x, rows], [f"{output}.flat_input"])  # [b s, hidden]: Gemm takes matrices only
    product = graph.node("Gemm", [flat, EMBEDDING], [f"{output}.flat"], transB=1)  # [b s, vocabulary]
    lengths = graph.node("Shape", [x], [f"{output}.lengths"], end=2)  # b, s
    width = graph.constant(f"{output}.width", np.array([architecture.vocabulary]))
    shape = graph.node("Concat", [lengths, width], [f"{output}.shape"], axis=0)
    return graph.node("Reshape", [product, shape], [output])


def linear(graph: Graph, x: str, name: str, parts: list[str], grid: Grid | None, output: str = "") -> str:
    """x times the transposed matrices of `parts`, side by side, plus their biases if they have any."""
    weights, biases = [f"{part}.weight" for part in parts], [f"{part}.bias" for part in parts]
    bias = graph.vectors(f"{name}.bias", biases) if biases[0] in graph.reader else ""
    output = output or f"{name}.out"
    if grid is None:
        matrix = graph.matrix(f"{name}.weight", weights, transposed=True)
        if not bias:
            return graph.node("MatMul", [x, matrix], [output])
        return graph.node("Add", [graph.node("MatMul", [x, matrix], [f"{name}.product"]), bias], [output])
    columns = graph.reader.shape(weights[0])[1]
    rows = sum(graph.reader.shape(weight)[0] for weight in weights)
    return multiply(graph, x, graph.table(f"{name}.weight", weights, grid), bias, columns, rows, output)


def multiply(graph: Graph, x: str, table: Table, bias: str, columns: int, rows: int, output: str) -> str:
    """x [b, s, columns] times a rounded table [rows, columns], transposed: [b, s, rows]."""
    inputs = [x, graph.use(table.codes), graph.use(table.scales), graph.use(table.zero_points), "", bias]
    return graph.node(
        "MatMulNBits",
        trim(inputs),
        [output],
        MICROSOFT,
        K=columns,
        N=rows,
        bits=table.grid.bits,
        block_size=table.grid.group_size,
        accuracy_level=FAST_LEVEL,
    )


def trim(inputs: list[str]) -> list[str]:
    """Optional inputs that are left out at the end are not named at all."""
    while not inputs[-1]:
        inputs.pop()
    return inputs
