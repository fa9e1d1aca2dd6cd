"""The weights of an OpenVINO artifact as floats, read without running OpenVINO's own decompression.

    state = dequantised(folder)     # {"model.layers.0.self_attn.q_proj.weight": [out, in], ...}

A rounded matrix is a Constant of codes, then Convert, Subtract (the zero points, unless symmetric), Multiply (the
scales), and where it has groups [out, groups, group size], Reshape. In OpenVINO's files two 4-bit codes make a byte,
the first in the low half; i4 is two's complement. All is computed in float32 here: (code - zero point) * scale.
"""

import re
from pathlib import Path

import numpy as np
import openvino

ROUNDED = ("i4", "u4", "i8", "u8")


def dequantised(folder: Path) -> dict[str, np.ndarray]:
    """Every rounded matrix, under the checkpoint's names: float32 [out, in]."""
    model = openvino.Core().read_model(folder / "openvino_model.xml")
    state = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or element_type(node) not in ROUNDED:
            continue
        name = node.get_friendly_name()
        match = re.fullmatch(r"self\.(.+)\.(weight|_openvino_orig_weight)", name)  # the second where it was bfloat16
        if match:
            state[f"{match[1]}.weight"] = dequantise(node)
    return state


def dequantise(codes) -> np.ndarray:
    values = read(codes)
    node = only_reader(only_reader(codes))
    if node.get_type_name() == "Subtract":
        values = values - read_converted(node.input_value(1).get_node())
        node = only_reader(node)
    assert node.get_type_name() == "Multiply"
    values = values * read_converted(node.input_value(1).get_node())
    return values.reshape(len(values), -1)


def read_converted(node) -> np.ndarray:
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return read(node)


def read(constant) -> np.ndarray:
    kind, shape = element_type(constant), list(constant.shape)
    if kind not in ("i4", "u4"):
        return np.array(constant.data, dtype=np.float32)
    packed = np.array(constant.data).view(np.uint8).reshape(-1)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: int(np.prod(shape))].astype(np.float32)
    return np.where(codes > 7, codes - 16, codes).reshape(shape) if kind == "i4" else codes.reshape(shape)


def only_reader(node):
    (reader,) = node.output(0).get_target_inputs()
    return reader.get_node()


def element_type(node) -> str:
    return node.get_element_type().get_type_name()
