"""Building blocks of the fused graphs. Tensors are named by strings; their shapes stand beside each line.

Shapes: b sequences of s tokens, t = past + s; H heads, K KV heads of width d.
Operators outside the ONNX standard are onnxruntime's (ContribOperators.md in its repository).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from normistral.artifact.manifest import Architecture
from normistral.export.onnx.graph import MICROSOFT, Graph, QuantizedMatrix
from normistral.export.quantize.scheme import QuantScheme

FAST_LEVEL = 4  # MatMulNBits' accuracy_level: activations rounded to int8 in blocks, products in int8


@dataclass(frozen=True, slots=True)
class WeightSchemes:
    """Quantization schemes of a model's matrices; None is floats.

    Attributes:
        inner: attention and feed-forward.
        output, embedding: of a tied model they are one matrix, and one choice.
    """

    inner: QuantScheme | None
    output: QuantScheme | None
    embedding: QuantScheme | None


@dataclass(frozen=True, slots=True)
class SequenceLengths:
    """Names of the length tensors that every layer's attention reads."""

    last_position: str  # int32 [b]: index of the last token
    total: str  # int32 []: t
    total_1d: str  # int64 [1]: t
    tokens_1d: str  # int64 [1]: s
    padding_row: str  # [b, 1, 1, t]: 0 where a token is, the lowest float where padding is


def add_lengths(graph: Graph) -> SequenceLengths:
    """Lengths and padding from the attention mask.

    Padded sequences count as long as the batch and their padding is masked: GroupQueryAttention takes lengths that are
    shorter for padding on the right, and generation pads on the left.
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
    graph.node("Shape", ["input_ids"], ["ids.shape"])
    tokens = graph.node("Slice", ["ids.shape", "range.1", "range.2"], ["tokens"])  # [s]
    total_1d = graph.node("Slice", ["mask.shape", "range.1", "range.2"], ["total.1d"])  # [t]

    graph.node("Cast", ["attention_mask"], ["mask.float"], to=graph.float_type)
    graph.constant("one.float", np.array(1, graph.float_dtype))
    graph.constant("lowest", np.array(np.finfo(graph.float_dtype).min, graph.float_dtype))
    graph.node("Sub", ["one.float", "mask.float"], ["mask.padded"])
    graph.node("Mul", ["mask.padded", "lowest"], ["mask.bias"])  # [b, t]
    row = graph.node("Unsqueeze", ["mask.bias", graph.constant("axes.1.2", np.array([1, 2]))], ["mask.row"])
    return SequenceLengths(last, total, total_1d, tokens, row)


def embed(graph: Graph, name: str, scheme: QuantScheme | None) -> tuple[QuantizedMatrix | None, str]:
    """Rows of the embedding `name` for the token ids: [b, s, hidden]."""
    if scheme is None:
        return None, graph.node("Gather", [graph.matrix(name, [name], transposed=False), "input_ids"], ["embedded"])
    table = graph.table(name, [name], scheme)
    rows, columns = graph.reader.shape(name)
    qweight = graph.view(table.qweight, f"{name}.rows", (rows, scheme.qweight_bytes(columns)))
    inputs = [qweight, "input_ids", graph.use(table.scales), graph.use(table.zero_points)]
    embedded = graph.node(
        "GatherBlockQuantized",
        trim(inputs),
        ["embedded"],
        MICROSOFT,
        bits=scheme.bits,
        block_size=scheme.group_size,
        gather_axis=0,
        quantize_axis=1,
    )
    return table, embedded


def group_query_attention(
    graph: Graph,
    packed: str,
    name: str,
    layer: int,
    architecture: Architecture,
    lengths: SequenceLengths,
    bias: str,
    rotary_tables: tuple[str, str] = ("", ""),
) -> str:
    """Attention of new tokens to past and new ones: [b, s, H d].

    Args:
        packed: queries, keys and values side by side [b, s, (H + 2 K) d].
        bias: added to the scores before the softmax: [b or 1, H or 1, s, t].
        rotary_tables: cosines and sines [context, d/2]; left out, nothing is turned.
    """
    past = [past_input(graph, f"past_key_values.{layer}.{kind}", architecture) for kind in ("key", "value")]
    inputs = [packed, "", "", *past, lengths.last_position, lengths.total, *rotary_tables]
    inputs += ["", bias]  # positions count from the first column, padding included: see llama.py
    outputs = [f"{name}.out", f"present.{layer}.key", f"present.{layer}.value"]  # [b, s, H d]; twice [b, K, t, d]
    return graph.node(
        "GroupQueryAttention",
        inputs,
        outputs,
        MICROSOFT,
        num_heads=architecture.heads,
        kv_num_heads=architecture.kv_heads,
        scale=float(architecture.head_dim**-0.5),
        local_window_size=-1 if architecture.sliding_window is None else architecture.sliding_window,
        do_rotary=int(bool(rotary_tables[0])),
        rotary_interleaved=0,
    )


def past_input(graph: Graph, name: str, architecture: Architecture) -> str:
    """A past tensor [b, K, past, d]; an empty one of another width, which ORTModelForCausalLM passes, is reshaped."""
    if architecture.head_dim * architecture.heads == architecture.hidden_size:
        return name
    shape = np.array([0, 0, 0, architecture.head_dim])  # 0 is: as it comes
    return graph.node("Reshape", [name, graph.constant(f"{name}.shape", shape)], [f"{name}.mended"])


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


def output_layer(
    graph: Graph,
    x: str,
    architecture: Architecture,
    scheme: QuantScheme | None,
    embedding: str,
    table: QuantizedMatrix | None,
) -> None:
    """Logits [b, s, vocabulary]; a tied output layer reads the embedding's own bytes.

    Args:
        embedding: its name; `table`: where it is rounded, None as floats.
    """
    if not architecture.tied_embeddings:
        linear(graph, x, "lm_head", ["lm_head"], scheme, output="logits")
    elif table is not None:
        multiply(graph, x, table, "", architecture.hidden_size, architecture.vocabulary, "logits")
    else:
        multiply_by_embedding(graph, x, embedding, architecture, "logits")


def multiply_by_embedding(graph: Graph, x: str, embedding: str, architecture: Architecture, output: str) -> str:
    """x [b, s, hidden] times the float embedding [vocabulary, hidden], which Gemm reads as it is stored."""
    rows = graph.constant(f"{output}.rows", np.array([-1, architecture.hidden_size]))
    flat = graph.node("Reshape", [x, rows], [f"{output}.flat_input"])  # [b s, hidden]: Gemm takes matrices only
    product = graph.node("Gemm", [flat, embedding], [f"{output}.flat"], transB=1)  # [b s, vocabulary]
    lengths = graph.node("Shape", [x], [f"{output}.lengths"], end=2)  # b, s
    width = graph.constant(f"{output}.width", np.array([architecture.vocabulary]))
    shape = graph.node("Concat", [lengths, width], [f"{output}.shape"], axis=0)
    return graph.node("Reshape", [product, shape], [output])


def linear(graph: Graph, x: str, name: str, parts: list[str], scheme: QuantScheme | None, output: str = "") -> str:
    """x times the transposed matrices of `parts`, side by side, plus their biases if they have any.

    Args:
        scheme: of those that no calibration has rounded; all parts have one.
    """
    weights, biases = [f"{part}.weight" for part in parts], [f"{part}.bias" for part in parts]
    bias = graph.vectors(f"{name}.bias", biases) if biases[0] in graph.reader else ""
    output = output or f"{name}.out"
    if scheme is None:
        matrix = graph.matrix(f"{name}.weight", weights, transposed=True)
        if not bias:
            return graph.node("MatMul", [x, matrix], [output])
        return graph.node("Add", [graph.node("MatMul", [x, matrix], [f"{name}.product"]), bias], [output])
    columns = graph.reader.shape(weights[0])[1]
    rows = sum(graph.reader.shape(weight)[0] for weight in weights)
    table = graph.table(f"{name}.weight", weights, graph.scheme_of(weights[0], scheme))
    return multiply(graph, x, table, bias, columns, rows, output)


def multiply(graph: Graph, x: str, table: QuantizedMatrix, bias: str, columns: int, rows: int, output: str) -> str:
    """x [b, s, columns] times a rounded table [rows, columns], transposed: [b, s, rows]."""
    inputs = [x, graph.use(table.qweight), graph.use(table.scales), graph.use(table.zero_points), "", bias]
    return graph.node(
        "MatMulNBits",
        trim(inputs),
        [output],
        MICROSOFT,
        K=columns,
        N=rows,
        bits=table.scheme.bits,
        block_size=table.scheme.group_size,
        accuracy_level=FAST_LEVEL,
    )


def trim(inputs: list[str]) -> list[str]:
    """Optional inputs that are left out at the end are not named at all."""
    while not inputs[-1]:
        inputs.pop()
    return inputs
