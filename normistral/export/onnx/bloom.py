"""The fused graph of BLOOM. Shapes as in blocks.py; F is the feed-forward width.

ALiBi (Press et al. 2022) adds to every score a slope of the head times the distance of the two tokens. Of
onnxruntime's attention operators that carry such a bias beside a KV cache, GroupQueryAttention is the one whose past
and present may be one buffer (docs/decisions.md has them all, measured).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normistral.artifact.manifest import Architecture
from normistral.export.checkpoint.families.bloom import BLOOM
from normistral.export.checkpoint.tensor import WeightReader
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

Parts = tuple[str, str, str]


def write_decoder(
    graph: Graph, architecture: Architecture, config: dict[str, Any], storage: WeightSchemes, context: int
) -> None:
    """Add the whole decoder: input_ids, attention_mask and past → logits and present.

    Args:
        config: sanitised config.json.
        context: not used: ALiBi has no table of positions.
    """
    lengths = add_lengths(graph)
    bias = alibi(graph, architecture.heads, lengths)
    table, embedded = embed(graph, BLOOM.embedding, storage.embedding)  # [b, s, hidden]
    hidden, skip = add_and_norm(graph, embedded, "", "transformer.word_embeddings_layernorm", config)[0], ""
    after_norm = config["apply_residual_connection_post_layernorm"]  # where the residual is taken
    for layer in range(architecture.layers):
        prefix = f"transformer.h.{layer}"
        normed, total = add_and_norm(graph, hidden, skip, f"{prefix}.input_layernorm", config)
        skip = normed if after_norm else total
        attended = attend(graph, normed, f"{prefix}.self_attention", layer, architecture, storage.inner, lengths, bias)
        normed, total = add_and_norm(graph, attended, skip, f"{prefix}.post_attention_layernorm", config)
        skip = normed if after_norm else total
        hidden = feed_forward(graph, normed, f"{prefix}.mlp", storage.inner)
    normed, _ = add_and_norm(graph, hidden, skip, "transformer.ln_f", config)
    output_layer(graph, normed, architecture, storage.output, BLOOM.embedding, table)


def alibi(graph: Graph, heads: int, lengths: SequenceLengths) -> str:
    """slope × (key's position - query's position), and padding: [b, H, s, t].

    transformers multiplies by the key's position alone. Along a row that differs by a constant, which the softmax does
    not see; distances stay small where it matters and do not need to know where padding ends.
    """
    graph.constant("slopes", slopes(heads).astype(graph.float_dtype)[:, None, None])  # [H, 1, 1]
    graph.constant("zero.int64", np.array(0, np.int64))
    graph.constant("one.int64", np.array(1, np.int64))
    keys = graph.node("Range", ["zero.int64", "total.int64", "one.int64"], ["keys"])  # [t]
    graph.node("Sub", [lengths.total_1d, lengths.tokens_1d], ["past.1d"])
    graph.node("Slice", [keys, "past.1d", lengths.total_1d], ["queries.row"])  # [s]
    queries = graph.node("Unsqueeze", ["queries.row", "range.1"], ["queries"])  # [s, 1]
    graph.node("Sub", [keys, queries], ["distances.int64"])  # [s, t]
    graph.node("Cast", ["distances.int64"], ["distances"], to=graph.float_type)
    graph.node("Mul", ["slopes", "distances"], ["alibi.heads"])  # [H, s, t]
    biases = graph.node("Unsqueeze", ["alibi.heads", "range.0"], ["alibi"])  # [1, H, s, t]
    return graph.node("Add", [biases, lengths.padding_row], ["alibi.padded"])


def slopes(heads: int) -> NDArray[np.float32]:
    """ALiBi's slope of every head [H]: 2^(-8/n), 2^(-16/n) ... for n heads, n a power of two.

    For other numbers, the slopes of the next smaller power of two, then every other slope of twice that power. Source:
    `build_alibi_tensor` in transformers' modeling_bloom.py; computed in float32 as there.
    """
    power = 2 ** math.floor(math.log2(heads))

    def geometric(count: int, exponents: NDArray[np.int32]) -> NDArray[np.float32]:
        return np.power(np.float32(2.0 ** -(2.0 ** -(math.log2(count) - 3))), exponents, dtype=np.float32)

    first = geometric(power, np.arange(1, power + 1, dtype=np.int32))
    rest = geometric(2 * power, np.arange(1, 2 * (heads - power) + 1, 2, dtype=np.int32))
    return np.concatenate([first, rest])


def add_and_norm(graph: Graph, x: str, skip: str, name: str, config: dict[str, Any]) -> tuple[str, str]:
    """The layer norm of x + skip, and x + skip: two times [b, s, hidden]. Without a skip, x stands for the sum."""
    gamma, beta = graph.vector(f"{name}.weight"), graph.vector(f"{name}.bias")
    epsilon = config["layer_norm_epsilon"]
    if not skip:
        normed = graph.node("LayerNormalization", [x, gamma, beta], [f"{name}.out"], axis=-1, epsilon=epsilon)
        return normed, x
    outputs = [f"{name}.out", "", "", f"{name}.sum"]
    normed = graph.node("SkipLayerNormalization", [x, skip, gamma, beta], outputs, MICROSOFT, epsilon=epsilon)
    return normed, outputs[3]


def attend(
    graph: Graph,
    x: str,
    name: str,
    layer: int,
    architecture: Architecture,
    scheme: QuantScheme | None,
    lengths: SequenceLengths,
    bias: str,
) -> str:
    """Attention over past and new tokens, and its output projection: [b, s, hidden]."""
    projections = split_heads(graph.reader, f"{name}.query_key_value", architecture)
    packed = linear(graph, x, f"{name}.query_key_value", list(projections), scheme)  # [b, s, 3 H d]
    attended = group_query_attention(graph, packed, name, layer, architecture, lengths, bias)
    return linear(graph, attended, f"{name}.dense", [f"{name}.dense"], scheme)


def split_heads(reader: WeightReader, name: str, architecture: Architecture) -> Parts:
    """Name the queries, keys and values in a matrix that has them head after head: attention takes them one by one."""
    width, heads = architecture.head_dim, architecture.heads
    parts: Parts = (f"{name}.query", f"{name}.key", f"{name}.value")
    for index, part in enumerate(parts):
        starts = range(index * width, 3 * heads * width, 3 * width)
        for kind in ("weight", "bias"):
            reader.add_view(f"{part}.{kind}", f"{name}.{kind}", [range(at, at + width) for at in starts])
    return parts


def feed_forward(graph: Graph, x: str, name: str, scheme: QuantScheme | None) -> str:
    """4h_to_h(gelu(h_to_4h(x))): [b, s, hidden]. BLOOM's GELU is the one with tanh."""
    wide = linear(graph, x, f"{name}.dense_h_to_4h", [f"{name}.dense_h_to_4h"], scheme)  # [b, s, F]
    activated = activate(graph, wide, "gelu_pytorch_tanh")
    return linear(graph, activated, f"{name}.dense_4h_to_h", [f"{name}.dense_4h_to_h"], scheme)
