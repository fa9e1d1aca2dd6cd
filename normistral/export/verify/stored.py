"""One matrix of a written artifact and a function that reads its rows back, for both formats.

Unpacking and dequantization are written anew here on purpose: shared code would check the writer with its own error.

In the IR a rounded matrix is a constant of codes with constants for scales and zero points beside it, which NNCF names
after it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from normistral.export.checkpoint.tensor import widen_bfloat16
from normistral.export.onnx.signature import DATA_NAME, GRAPH_NAME
from normistral.export.openvino import IR_NAME
from normistral.export.quantize.scheme import smallest_representable

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix [out, in] under the checkpoint's name.

    Attributes:
        bits: of a weight: 4, 8, 16 or 32.
        group_size: weights of a row that share one scale; of floats the whole row.
        smallest: least magnitude that a group's largest weight needs to be stored to its own precision; what is below
            counts as zero.
        read: rows by their numbers, as float32 [n, in].
    """

    name: str
    bits: int
    group_size: int
    smallest: float
    read: Callable[[Sequence[int]], Values]


@dataclass(frozen=True, slots=True)
class StoredPositions:
    """Position constants of an artifact's attention; None for those that cannot be found.

    Attributes:
        frequencies: radians a position, [head_dim/2].
        factor: what cosines and sines are multiplied by.
        window: tokens that attention reaches back; None is all.
        dtype: "float16" where the two first were stored so.
    """

    frequencies: NDArray[np.float64] | None
    factor: float | None
    window: int | None
    dtype: str = "float32"


def unpack(codes: NDArray[np.uint8], bits: int) -> Values:
    """Unsigned codes [rows, bytes] as numbers [rows, codes]; at 4 bits two to a byte, the first in the low half."""
    if bits == 8:
        return codes.astype(np.float32)
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1).astype(np.float32)


def dequantize(codes: Values, scales: Values, zero_points: Values | float) -> Values:
    """(code - zero point) × scale.

    Args:
        codes: [rows, in].
        scales: [rows, groups]; `zero_points` likewise, or one for all.
    """
    rows, groups = scales.shape
    blocks = codes.reshape(rows, groups, -1)
    zeros = zero_points if isinstance(zero_points, float) else zero_points[..., None]
    return ((blocks - zeros) * scales[..., None]).reshape(rows, -1)


class OnnxWeights:
    """The initializers of model.onnx by name.

    Args:
        embedding: name of the token embedding: floats are stored as in the checkpoint there, and transposed elsewhere.
    """

    def __init__(self, folder: Path, embedding: str) -> None:
        self._data = folder / DATA_NAME
        self._embedding = embedding
        graph = onnx.load(folder / GRAPH_NAME, load_external_data=False).graph
        self._nodes = list(graph.node)
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}

    def vectors(self) -> dict[str, Values]:
        """Norms and biases, and other small floats."""
        return {
            name: onnx.numpy_helper.to_array(tensor).astype(np.float32)
            for name, tensor in self._tensors.items()
            if tensor.data_location != onnx.TensorProto.EXTERNAL and len(tensor.dims) == 1
        }

    def positions(self) -> StoredPositions:
        """The fused graph's tables and windows, or the constants of the plain one, by the names Optimum gives them."""
        if "rotary.cos" not in self._tensors:
            return self._plain_positions()
        cosines, sines = (self._rows(f"rotary.{name}", range(2)).astype(np.float64) for name in ("cos", "sin"))
        windows = set()
        for node in self._nodes:
            if node.op_type == "GroupQueryAttention":
                windows |= {entry.i for entry in node.attribute if entry.name == "local_window_size"}
        window = windows.pop() if len(windows) == 1 else 0
        return StoredPositions(
            frequencies=np.arctan2(sines[1], cosines[1]),
            factor=float(np.mean(np.hypot(cosines, sines))),
            window=None if window == -1 else window,
            dtype=str(_dtype(self._tensors["rotary.cos"])),
        )

    def _plain_positions(self) -> StoredPositions:
        made = {node.output[0]: node for node in self._nodes}

        def constants(*names: str) -> list[NDArray[Any]]:
            """Constants that nodes of these names read."""
            read = [made.get(name) for node in self._nodes if node.name in names for name in node.input]
            return [
                onnx.numpy_helper.to_array(node.attribute[0].t) for node in read if node and node.op_type == "Constant"
            ]

        frequencies = constants("/model/rotary_emb/Expand")
        scales = {float(value) for value in constants("/model/rotary_emb/Mul_1", "/model/rotary_emb/Mul_2")}
        windows = {int(value) for value in constants("/model/Sub")}  # the query's position minus the window
        return StoredPositions(
            frequencies=frequencies[0].astype(np.float64).reshape(-1) if frequencies else None,
            factor=1.0 if not scales else scales.pop() if len(scales) == 1 else None,
            window=None if not windows else windows.pop(),
        )

    def matrices(self) -> Iterator[StoredMatrix]:
        """Every matrix of the graph; one that packs several comes under its packed name."""
        seen = set()
        for node in self._nodes:
            inputs = list(node.input)
            if node.op_type == "MatMulNBits":
                codes, scales, zeros = inputs[1], inputs[2], inputs[3] if len(inputs) > 3 else ""
            elif node.op_type == "GatherBlockQuantized":
                codes, scales, zeros = inputs[0], inputs[2], inputs[3] if len(inputs) > 3 else ""
            else:
                continue
            name = scales.removesuffix(".scales")
            if name not in seen:
                seen.add(name)
                yield self._rounded(name, node, codes, scales, zeros)
        for name, tensor in self._tensors.items():
            external = tensor.data_location == onnx.TensorProto.EXTERNAL
            if external and name.endswith(".weight") and tensor.data_type != onnx.TensorProto.UINT8:
                yield self._floats(name, tensor)

    def _rounded(self, name: str, node: onnx.NodeProto, codes: str, scales: str, zeros: str) -> StoredMatrix:
        attributes = {entry.name: entry.i for entry in node.attribute}
        bits, group_size = attributes["bits"], attributes["block_size"]

        def read(rows: Sequence[int]) -> Values:
            values = unpack(self._rows(codes, rows), bits)
            scale = self._rows(scales, rows).astype(np.float32)
            if not zeros:
                return dequantize(values, scale, float(2 ** (bits - 1)))
            return dequantize(values, scale, unpack(self._rows(zeros, rows), bits)[:, : scale.shape[1]])

        return StoredMatrix(name, bits, group_size, smallest_representable(bits, float16=False), read)

    def _floats(self, name: str, tensor: onnx.TensorProto) -> StoredMatrix:
        bits = 16 if tensor.data_type == onnx.TensorProto.FLOAT16 else 32
        smallest = smallest_representable(bits, float16=bits == 16)
        if name == self._embedding:
            return StoredMatrix(name, bits, tensor.dims[1], smallest, lambda rows: self._rows(name, rows).astype("f4"))
        return StoredMatrix(name, bits, tensor.dims[0], smallest, partial(self._columns, tensor))

    def _columns(self, tensor: onnx.TensorProto, columns: Sequence[int]) -> Values:
        mapped = np.memmap(self._data, _dtype(tensor), "r", int(_place(tensor)["offset"]), tuple(tensor.dims))
        return np.ascontiguousarray(mapped[:, list(columns)].T).astype(np.float32)

    def _rows(self, name: str, rows: Sequence[int]) -> NDArray[Any]:
        """Rows of a tensor of the data file, flattened: [n, items]."""
        tensor = self._tensors[name]
        dtype, items = _dtype(tensor), math.prod(tensor.dims[1:])
        start = int(_place(tensor)["offset"])
        if isinstance(rows, range) and rows.step == 1:  # at once
            first = start + rows.start * items * dtype.itemsize
            return np.fromfile(self._data, dtype, len(rows) * items, offset=first).reshape(len(rows), items)
        found = [np.fromfile(self._data, dtype, items, offset=start + row * items * dtype.itemsize) for row in rows]
        return np.stack(found)


def _dtype(tensor: onnx.TensorProto) -> np.dtype[Any]:
    return onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)


def _place(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


_MATRIX = re.compile(r"self\.(.+)\.(?:weight|_openvino_orig_weight)")  # the second where it was 16 bits wide
_BITS = {"i4": 4, "u4": 4, "i8": 8, "u8": 8, "f16": 16, "bf16": 16, "f32": 32}


class OpenVINOWeights:
    """The constants of openvino_model.xml by name; mapped, as OpenVINO reads them."""

    def __init__(self, folder: Path) -> None:
        import openvino

        self._model = openvino.Core().read_model(folder / IR_NAME)
        self._constants = {
            node.get_friendly_name(): node for node in self._model.get_ops() if node.get_type_name() == "Constant"
        }

    def matrices(self) -> Iterator[StoredMatrix]:
        """Every matrix of the graph."""
        for name, node in self._constants.items():
            match = _MATRIX.fullmatch(name)
            if match and len(node.output(0).get_shape()) >= 2:
                yield self._matrix(f"{match[1]}.weight", name, node)

    def positions(self) -> StoredPositions:
        """The constants of rotary positions, and of the mask's sliding window."""
        named = [node for name, node in self._constants.items() if "rotary_emb" in name]
        tables = [node for node in named if _kind(node) == "f32" and len(node.output(0).get_shape()) == 3]
        frequencies = np.array(tables[0].data, np.float64).reshape(-1) if len(tables) == 1 else None
        factors = self._scalars("rotary_emb/aten::mul/")
        windows = {-window for window in self._scalars("model/aten::sub/")}  # the query's position minus the window
        return StoredPositions(
            frequencies,
            factor=_only(factors, absent=1.0),
            window=None if not windows else int(_only(windows, absent=0.0) or 0),
        )

    def _scalars(self, consumer: str) -> set[float]:
        """Constants of one element that a node reads whose name holds `consumer`."""
        found = set()
        for node in self._constants.values():
            readers = [target.get_node().get_friendly_name() for target in node.output(0).get_target_inputs()]
            if np.prod(node.output(0).get_shape()) == 1 and any(consumer in name for name in readers):
                found.add(float(node.data.reshape(-1)[0]))
        return found

    def _matrix(self, name: str, constant: str, node: Any) -> StoredMatrix:
        shape, bits = list(node.output(0).get_shape()), _BITS[_kind(node)]
        columns = int(np.prod(shape[1:]))
        if bits >= 16:
            smallest = smallest_representable(bits, float16=_kind(node) == "f16")
            return StoredMatrix(name, bits, columns, smallest, lambda rows: _floats(node, shape, rows))
        groups = shape[1] if len(shape) == 3 else 1
        signed = _kind(node).startswith("i")
        scales = self._constants[f"{constant}/scale"]
        zeros = self._constants.get(f"{constant}/zero_point")

        def read(rows: Sequence[int]) -> Values:
            codes = _codes(node, shape[0], columns, bits, rows)
            if signed:
                codes = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
            scale = _floats(scales, [shape[0], groups], rows)
            if zeros is None:
                return dequantize(codes, scale, 0.0)
            return dequantize(codes, scale, _codes(zeros, shape[0], groups, bits, rows))

        smallest = smallest_representable(bits, float16=_kind(scales) == "f16")
        return StoredMatrix(name, bits, columns // groups, smallest, read)


def _only(values: set[float], absent: float) -> float | None:
    """The one value; None where they differ."""
    return absent if not values else values.pop() if len(values) == 1 else None


def _codes(node: Any, rows: int, columns: int, bits: int, wanted: Sequence[int]) -> Values:
    """Unsigned codes [n, columns] of some rows; rows of 4-bit codes may begin in the middle of a byte."""
    packed = np.asarray(node.data).reshape(-1).view(np.uint8)
    if bits == 8:
        return packed.reshape(rows, columns)[list(wanted)].astype(np.float32)
    if columns % 2 == 0:
        return unpack(packed.reshape(rows, columns // 2)[list(wanted)], 4)
    found = []
    for row in wanted:
        start, stop = row * columns, (row + 1) * columns
        codes = unpack(packed[start // 2 : -(-stop // 2)][None], 4)[0]
        found.append(codes[start % 2 :][:columns])
    return np.stack(found)


def _floats(node: Any, shape: list[int], rows: Sequence[int]) -> Values:
    data = np.asarray(node.data)
    if _kind(node) == "bf16":
        return widen_bfloat16(data.reshape(-1).view(np.uint16).reshape(shape[0], -1)[list(rows)])
    return data.reshape(shape[0], -1)[list(rows)].astype(np.float32)


def _kind(node: Any) -> str:
    return str(node.get_element_type().get_type_name())
