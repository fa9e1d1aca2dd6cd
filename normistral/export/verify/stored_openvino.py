"""Reads the weights of a written OpenVINO IR back, without OpenVINO's own decompression.

A rounded matrix is a constant of codes with constants for scales and zero points beside it, which NNCF names after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from normistral.export.checkpoint.tensor import widen_bfloat16
from normistral.export.openvino import IR_NAME
from normistral.export.quantize.scheme import smallest_representable
from normistral.export.verify.stored import StoredMatrix, StoredPositions, Values, dequantize, unpack

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
