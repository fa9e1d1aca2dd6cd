"""Quantization schemes of 4 or 8 bits: parameters, packing, dequantization.

A row of K weights is cut into groups of `group_size`; weight = (qweight - zero point) × scale. Values are unsigned, two
to a byte at 4 bits with the first in the low half. Without zero points the zero point is 8 (4 bits) or 128 (8 bits).
So MatMulNBits and GatherBlockQuantized of onnxruntime read them (its ContribOperators.md); OpenVINO's u4 and u8 are the
same bytes, and its i4 and i8 differ in the highest bit of each value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SMALLEST_SCALE = np.finfo(np.float32).tiny  # below it 1/scale overflows; such weights are zeros
# Float16 counts in steps of 2^-24 below 2^-14: a scale of 2^-19 is right to a 64th, as fine as 4 bits need it to be.
_SMALLEST_FLOAT16, _SMALLEST_FLOAT16_SCALE = 2.0**-14, 2.0**-19


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """Storage of a matrix: 4 or 8 `bits`, a scale per `group_size` weights of a row, with or without zero points.

    Scales are float16 in OpenVINO, and float32 in ONNX.
    """

    bits: int
    group_size: int
    symmetric: bool
    float16_scales: bool = False

    @property
    def top(self) -> int:
        """The highest value."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme."""
        return int(2 ** (self.bits - 1))

    def qweight_bytes(self, columns: int) -> int:
        """Bytes of a row's packed values."""
        return columns * self.bits // 8

    def zero_point_bytes(self, columns: int) -> int:
        """Bytes of a row's zero points, packed like the values."""
        return -(-columns // self.group_size * self.bits // 8)


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Quantized rows: qweight uint8 [rows, bytes], scales float32 [rows, groups], zero points uint8 [rows, bytes]."""

    qweight: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None


@dataclass(frozen=True, slots=True)
class QuantParams:
    """Scales and zero points of each group, both float32 [rows, groups]."""

    scales: NDArray[np.float32]
    zero_points: NDArray[np.float32]


def smallest_representable(bits: int, *, float16: bool) -> float:
    """The least magnitude that the largest weight of a group needs for the group to be stored to its own precision.

    Args:
        bits: of the values; 16 or 32 for weights that are stored as floats.
        float16: whether scales, or the weights themselves, are float16; otherwise they have float32's exponents.
    """
    if bits >= 16:
        return _SMALLEST_FLOAT16 if float16 else float(SMALLEST_SCALE)
    return float(2 ** (bits - 1) * (_SMALLEST_FLOAT16_SCALE if float16 else SMALLEST_SCALE))


@np.errstate(over="ignore")  # beyond float16; float16_range.py refuses them where it matters
def round_scales(params: QuantParams, scheme: QuantScheme) -> QuantParams:
    """Round scales to float16, which both formats hold; with float32 scales those outside its range are kept."""
    rounded = params.scales.astype(np.float16).astype(np.float32)
    if not scheme.float16_scales:
        size = np.abs(params.scales)
        rounded = np.where((size >= _SMALLEST_FLOAT16) & np.isfinite(rounded), rounded, params.scales)
    return QuantParams(rounded, params.zero_points)


def dequantize(qweight: NDArray[np.uint8], params: QuantParams, scheme: QuantScheme) -> NDArray[np.float32]:
    """Weights [rows, columns] from unpacked values of the same shape."""
    values = split_groups(qweight.astype(np.float32), scheme)
    values -= params.zero_points[..., None]
    values *= params.scales[..., None]
    return values.reshape(qweight.shape)


def pack(qweight: NDArray[np.uint8], params: QuantParams, scheme: QuantScheme) -> QuantizedTensor:
    """Unpacked values [rows, columns] and their parameters as they are stored."""
    zeros = None if scheme.symmetric else _pack(params.zero_points.astype(np.uint8), scheme.bits)
    return QuantizedTensor(_pack(qweight, scheme.bits), params.scales, zeros)


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Values one to a byte; the padding of an odd row is still there."""
    if bits == 8:
        return packed
    return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1).reshape(len(packed), -1)


def split_groups(rows: NDArray[np.float32], scheme: QuantScheme) -> NDArray[np.float32]:
    """A view of rows [rows, columns] as [rows, groups, group_size]."""
    return rows.reshape(len(rows), rows.shape[1] // scheme.group_size, scheme.group_size)


def _pack(qweight: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Two 4-bit values to a byte, the first in the low half; a row of odd length is padded with a zero."""
    if bits == 8:
        return qweight
    if qweight.shape[1] % 2:
        qweight = np.pad(qweight, ((0, 0), (0, 1)))
    return qweight[:, 0::2] | (qweight[:, 1::2] << np.uint8(4))
