"""Round float weights to blocks of 4 or 8 bits, as onnxruntime's MatMulNBits and GatherBlockQuantized read them.

A row of K weights is cut into blocks of `group_size`; weight = (code - zero point) × scale. Codes are unsigned, two to
a byte at 4 bits with the first in the low half. Without zero points the zero point is 8 (4 bits) or 128 (8 bits).
Source: MatMulNBits in onnxruntime's ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SMALLEST_SCALE = np.finfo(np.float32).tiny  # below it 1/scale overflows; such weights are zeros


@dataclass(frozen=True, slots=True)
class Grid:
    """How a matrix is stored: 4 or 8 `bits`, a scale for every `group_size` weights of a row, zero points or none."""

    bits: int
    group_size: int
    symmetric: bool

    def code_bytes(self, columns: int) -> int:
        """Bytes of a row's codes."""
        return columns * self.bits // 8

    def zero_point_bytes(self, columns: int) -> int:
        """Bytes of a row's zero points, packed like the codes."""
        return -(-columns // self.group_size * self.bits // 8)


@dataclass(frozen=True, slots=True)
class Rounded:
    """Rows on a grid: codes uint8 [rows, bytes], scales float32 [rows, blocks], zero points uint8 [rows, bytes]."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None


@np.errstate(invalid="ignore")  # of values that are no numbers: the scales say so
def round_rows(rows: NDArray[np.float32], grid: Grid) -> Rounded:
    """Round to nearest.

    Symmetric: the weight of the largest magnitude in a block takes the code 0, which is one step farther from the zero
    point than the highest code, so that no code is left unused.

    Args:
        rows: float32 [rows, columns]; columns a multiple of the group size. A block with a value that is no finite
            number gets a scale that is none either.
    """
    count, columns = rows.shape
    blocks = rows.reshape(count, columns // grid.group_size, grid.group_size)
    top = 2**grid.bits - 1
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)  # [rows, blocks]
    if grid.symmetric:
        middle = 2 ** (grid.bits - 1)
        scales = np.where(-low >= high, low, high) / np.float32(-middle)
        zeros = np.full(1, middle, np.float32)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)  # zero itself stays exact
        scales = (high - low) / np.float32(top)
        zeros = np.rint(np.clip(-low / np.where(scales == 0, 1, scales), 0, top)).astype(np.float32)
    scales[np.abs(scales) < _SMALLEST_SCALE] = 0
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    codes = blocks * inverse[..., None]
    codes += zeros[..., None]
    np.rint(codes, out=codes)
    np.clip(codes, 0, top, out=codes)
    packed = _pack(codes.astype(np.uint8).reshape(count, columns), grid.bits)
    return Rounded(
        packed, scales.astype(np.float32), None if grid.symmetric else _pack(zeros.astype(np.uint8), grid.bits)
    )


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Two 4-bit codes to a byte, the first in the low half; a row of odd length is filled up with a zero."""
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
