"""Reads the weights of a written ONNX artifact back, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from normistral.export.onnx.signature import DATA_NAME, GRAPH_NAME
from normistral.export.quantize.scheme import smallest_representable
from normistral.export.verify.stored import StoredMatrix, StoredPositions, Values, dequantize, unpack


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
        (cosines, sines), windows = self.rotary_tables(2), set()
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

    def rotary_tables(self, positions: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Cosines and sines of the first positions."""
        rows = range(positions)
        return self._rows("rotary.cos", rows).astype(np.float64), self._rows("rotary.sin", rows).astype(np.float64)

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
