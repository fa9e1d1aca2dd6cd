"""One matrix of a written artifact and a function that reads its rows back, for both formats.

Unpacking and dequantization are written anew here on purpose: shared code would check the writer with its own error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
