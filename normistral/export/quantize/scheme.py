"""Grids of 4 or 8 bits, and rounding to nearest on them.

A row of K weights is cut into blocks of `group_size`; weight = (code - zero point) × scale. Codes are unsigned, two to
a byte at 4 bits with the first in the low half. Without zero points the zero point is 8 (4 bits) or 128 (8 bits).
So MatMulNBits and GatherBlockQuantized of onnxruntime read them (its ContribOperators.md); OpenVINO's u4 and u8 are the
same bytes, and its i4 and i8 differ in the highest bit of each code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SMALLEST_SCALE = np.finfo(np.float32).tiny  # below it 1/scale overflows; such weights are zeros
# Float16 counts in steps of 2^-24 below 2^-14: a scale of 2^-19 is right to a 64th, as fine as 4 bits need it to be.
_SMALLEST_FLOAT16, _SMALLEST_FLOAT16_SCALE = 2.0**-14, 2.0**-19


@dataclass(frozen=True, slots=True)
class Grid:
    """How a matrix is stored: 4 or 8 `bits`, a scale for every `group_size` weights of a row, zero points or none.

    Scales are float16 in OpenVINO, and float32 in ONNX.
    """

    bits: int
    group_size: int
    symmetric: bool
    float16_scales: bool = False

    @property
    def top(self) -> int:
        """The highest code."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return int(2 ** (self.bits - 1))

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


@dataclass(frozen=True, slots=True)
class Steps:
    """Where the codes of each block lie: scales and zero points, both float32 [rows, blocks]."""

    scales: NDArray[np.float32]
    zero_points: NDArray[np.float32]


def round_rows(rows: NDArray[np.float32], grid: Grid) -> Rounded:
    """Round to nearest.

    Args:
        rows: float32 [rows, columns]; columns a multiple of the group size. A block with a value that is no finite
            number gets a scale that is none either.
    """
    steps = span(rows, grid)
    return pack(nearest_codes(rows, steps, grid), steps, grid)


@np.errstate(invalid="ignore")  # of values that are no numbers: the scales say so
def span(rows: NDArray[np.float32], grid: Grid) -> Steps:
    """Steps that reach from the lowest weight of a block to the highest.

    Symmetric: the weight of the largest magnitude in a block takes the code 0, which is one step farther from the zero
    point than the highest code, so that no code is left unused.
    """
    blocks = _blocks(rows, grid)
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)  # [rows, blocks]
    if grid.symmetric:
        scales = np.where(-low >= high, low, high) / np.float32(-grid.middle)
        zeros = np.full_like(scales, grid.middle)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)  # zero itself stays exact
        scales = (high - low) / np.float32(grid.top)
        zeros = np.rint(np.clip(-low / np.where(scales == 0, 1, scales), 0, grid.top)).astype(np.float32)
    scales[np.abs(scales) < _SMALLEST_SCALE] = 0
    return Steps(scales.astype(np.float32, copy=False), zeros)


def smallest_held(bits: int, *, float16: bool) -> float:
    """The least magnitude that the largest weight of a group needs for the group to be stored to its own precision.

    Args:
        bits: of the codes; 16 or 32 for weights that are stored themselves.
        float16: whether scales, or the weights themselves, are float16; otherwise they have float32's exponents.
    """
    if bits >= 16:
        return _SMALLEST_FLOAT16 if float16 else float(_SMALLEST_SCALE)
    return float(2 ** (bits - 1) * (_SMALLEST_FLOAT16_SCALE if float16 else _SMALLEST_SCALE))


@np.errstate(over="ignore")  # beyond float16; float16_range.py lets none pass where that matters
def storable(steps: Steps, grid: Grid) -> Steps:
    """The same with scales rounded to float16, which both formats hold; in float32 those beyond its range stay."""
    rounded = steps.scales.astype(np.float16).astype(np.float32)
    if not grid.float16_scales:
        size = np.abs(steps.scales)
        rounded = np.where((size >= _SMALLEST_FLOAT16) & np.isfinite(rounded), rounded, steps.scales)
    return Steps(rounded, steps.zero_points)


@np.errstate(invalid="ignore")
def nearest_codes(rows: NDArray[np.float32], steps: Steps, grid: Grid) -> NDArray[np.uint8]:
    """The code of each weight that lies nearest to it: uint8 [rows, columns]."""
    inverse = np.divide(np.float32(1), steps.scales, out=np.zeros_like(steps.scales), where=steps.scales != 0)
    codes = _blocks(rows, grid) * inverse[..., None]
    codes += steps.zero_points[..., None]
    np.rint(codes, out=codes)
    np.clip(codes, 0, grid.top, out=codes)
    return codes.astype(np.uint8).reshape(rows.shape)


def restore(codes: NDArray[np.uint8], steps: Steps, grid: Grid) -> NDArray[np.float32]:
    """The weights that codes [rows, columns] stand for."""
    values = _blocks(codes.astype(np.float32), grid) - steps.zero_points[..., None]
    return np.asarray(values * steps.scales[..., None]).reshape(codes.shape)


def pack(codes: NDArray[np.uint8], steps: Steps, grid: Grid) -> Rounded:
    """Codes [rows, columns] and their steps as they are stored."""
    zeros = None if grid.symmetric else _pack(steps.zero_points.astype(np.uint8), grid.bits)
    return Rounded(_pack(codes, grid.bits), steps.scales, zeros)


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes one to a byte; what filled up a row is still there."""
    if bits == 8:
        return packed
    return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1).reshape(len(packed), -1)


def _blocks(rows: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    return rows.reshape(len(rows), rows.shape[1] // grid.group_size, grid.group_size)


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Two 4-bit codes to a byte, the first in the low half; a row of odd length is filled up with a zero."""
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
