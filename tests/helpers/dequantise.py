"""The weights of an ONNX artifact as floats, read without the code that wrote or runs it.

    state = dequantised(folder)     # {"model.layers.0.self_attn.q_proj.weight": [out, in], ...}

Source: MatMulNBits and GatherBlockQuantized in onnxruntime's ContribOperators.md. A row of K weights is cut into
blocks; codes are unsigned, at 4 bits two to a byte, the first in the low half; weight = (code - zero point) * scale,
and without zero points the zero point is the middle of the codes.
"""

import re
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper


def dequantised(folder: Path) -> dict[str, np.ndarray]:
    """Every rounded matrix, under the checkpoint's names: float32 [out, in]."""
    model = onnx.load(folder / "model.onnx")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    state = {}
    for node in model.graph.node:
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        if node.op_type == "MatMulNBits":
            codes, scales = node.input[1:3]
            zeros = node.input[3] if len(node.input) > 3 else ""
        elif node.op_type == "GatherBlockQuantized":
            codes, scales = node.input[0], node.input[2]
            zeros = node.input[3] if len(node.input) > 3 else ""
        else:
            continue
        name = scales.removesuffix(".scales")
        matrix = dequantise(
            arrays[codes], arrays[scales], arrays.get(zeros), attributes["bits"], attributes["block_size"]
        )
        if packed := re.fullmatch(r"(.+\.)([qkv]{2,3})(_proj\.weight)", name):
            state |= split_attention(packed, matrix, model)
        elif "query_key_value" in name:
            state[name] = interleave(matrix, node, model)
        else:
            state[name] = matrix
    return state


def dequantise(codes, scales, zeros, bits, block):
    rows, blocks = scales.shape
    middle = np.full((rows, blocks), 1 << (bits - 1), np.float64)
    zero_points = middle if zeros is None else unpack(zeros.reshape(rows, -1), bits)[:, :blocks]
    values = unpack(codes.reshape(rows, -1), bits)[:, : blocks * block].reshape(rows, blocks, block)
    matrix = (values - zero_points[..., None]) * scales.astype(np.float64)[..., None]
    return matrix.reshape(rows, -1).astype(np.float32)


def unpack(packed, bits):
    if bits == 8:
        return packed.astype(np.float64)
    assert bits == 4
    both = np.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(len(packed), -1).astype(np.float64)


def split_attention(packed, matrix, model):
    """Rows of the packed projection: queries, then keys, then values, as far as its name has them."""
    prefix, kinds, suffix = packed.groups()
    attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    counts = {entry.name: entry.i for entry in attention.attribute}
    heads = [counts["num_heads" if kind == "q" else "kv_num_heads"] for kind in kinds]
    cuts = np.cumsum(heads)[:-1] * (len(matrix) // sum(heads))
    return {prefix + kind + suffix: rows for kind, rows in zip(kinds, np.split(matrix, cuts), strict=True)}


def interleave(matrix, node, model):
    """BLOOM's order: head after head, the rows of its query, its key and its value."""
    attention = next(other for other in model.graph.node if node.output[0] in other.input)
    heads = next(entry.i for entry in attention.attribute if entry.name == "num_heads")
    return matrix.reshape(3, heads, -1, matrix.shape[1]).swapaxes(0, 1).reshape(matrix.shape)
