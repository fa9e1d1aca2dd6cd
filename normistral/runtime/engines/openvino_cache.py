"""OpenVINO's KV cache as the plugin stores it, from the float32 that it shows.

A state reads as float32 whatever KV_CACHE_PRECISION is in force. Of a cache in 16 bits that is a widening, which half
the bytes hold without loss. Of an 8-bit one (the CPU's default) it is what the codes stand for:

    scale = (most - least) / 255      zero = -least / scale         of each row: one token, one head
    code = round(value / scale + zero)          value = (code - zero) * scale

Written back as they are, such values are quantised again with a scale that differs in its last bits, and the next
answer drifts as far as 8 bits allow. So a row is kept as its codes and the two numbers, least and most, from which the
plugin computes the very same scale. They are not shown, but lie within a few units in the last place of what is, and
are found by trying (attn_quant.cpp of OpenVINO's CPU plugin; a test compares the caches bit by bit).

What does not come out the same is kept as float32.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normistral.runtime.engines.base import Logits

_ENDS = 8  # bytes behind the codes of a row: least and most, float32
_LARGEST_CODE = np.float32(255)
_FLAT = np.float32(1e-4)  # the scale of a row whose values are all the same
_PLACES = 4  # how far to look for the least and the most; 3 is enough for values four deviations from 0
_STEPS = sorted(  # the likeliest first: least is mostly the number that is shown, most one or two beside it
    product(range(-_PLACES, _PLACES + 1), repeat=2), key=lambda steps: 3 * abs(steps[0]) + abs(steps[1])
)


def pack(values: NDArray[Any], precision: str) -> NDArray[Any]:
    """The values in as few bytes as hold them without loss.

    Args:
        values: [1, kv_heads, n, head_dim], as the state shows them.
        precision: OpenVINO's name of the cache's own type: "u8", "f16", "bf16", "f32" ...

    Returns:
        uint8 [1, kv_heads, n, head_dim + 8], float16, uint16 (the upper half of float32), or the values themselves.
    """
    if values.dtype != np.float32:
        return values
    if precision == "u8":
        packed = _pack_rows(values)
        return values if packed is None else packed
    with np.errstate(over="ignore"):
        narrow: NDArray[Any] | None = {
            "f16": lambda: values.astype(np.float16),
            "bf16": lambda: (values.view(np.uint32) >> 16).astype(np.uint16),
        }.get(precision, lambda: None)()
    return values if narrow is None or not np.array_equal(unpack(narrow), values) else narrow


def is_lossless(packed: NDArray[Any], precision: str) -> bool:
    """Whether the plugin stores what it stored when `pack` gave this; see there for `precision`."""
    return packed.dtype != np.float32 or precision in ("f32", "f16", "bf16")


def unpack(packed: NDArray[Any]) -> Logits:
    """Float32 values that make the plugin store what it stored when `pack` was given them."""
    if packed.dtype == np.uint8:
        return _unpack_rows(packed)
    if packed.dtype == np.uint16:
        return (packed.astype(np.uint32) << 16).view(np.float32)
    return packed.astype(np.float32, copy=False)


def packed_kinds(shape: tuple[int, ...]) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
    """Types and shapes in which values of this shape may come."""
    rows = (*shape[:-1], shape[-1] + _ENDS)
    return [(np.dtype(np.uint8), rows), *((np.dtype(t), shape) for t in (np.float32, np.float16, np.uint16))]


def _pack_rows(values: Logits) -> NDArray[np.uint8] | None:
    """Codes and ends of every row; None where some row is not of the form above."""
    rows = values.reshape(-1, values.shape[-1])
    least, most = rows.min(1), rows.max(1)
    scale, zero = _scale_and_zero(least, most)
    with np.errstate(invalid="ignore"):  # what is not finite fits nowhere
        codes = np.rint(rows / scale[:, None] + zero[:, None]).astype(np.uint8)
        unit = np.spacing(np.abs(least))
        span_unit = np.maximum(np.spacing(np.abs(most)), np.spacing(most - least) / 2)  # finer ones change no scale
    ends = np.empty((len(rows), 2), "<f4")
    left = np.arange(len(rows))
    for lower, higher in _STEPS:
        low = least[left] + np.float32(lower) * unit[left]
        high = most[left] + np.float32(higher) * span_unit[left]
        scale, zero = _scale_and_zero(low, high)
        with np.errstate(invalid="ignore", over="ignore"):
            fits = ((0 - zero) * scale == least[left]) & ((_LARGEST_CODE - zero) * scale == most[left])
        fits[fits] = (_dequantise(codes[left[fits]], scale[fits], zero[fits]) == rows[left[fits]]).all(1)
        ends[left[fits], 0], ends[left[fits], 1] = low[fits], high[fits]
        left = left[~fits]
        if not len(left):
            return np.concatenate([codes, ends.view(np.uint8)], axis=1).reshape(*values.shape[:-1], -1)
    return None


def _unpack_rows(packed: NDArray[np.uint8]) -> Logits:
    codes = packed[..., :-_ENDS]
    ends = np.ascontiguousarray(packed[..., -_ENDS:]).view("<f4")  # [1, kv_heads, n, 2]
    least, most = ends[..., 0], ends[..., 1]
    values = _dequantise(codes, *_scale_and_zero(least, most))
    np.copyto(values, least[..., None], where=codes == 0)
    np.copyto(values, most[..., None], where=codes == _LARGEST_CODE)
    return values


def _dequantise(codes: NDArray[np.uint8], scale: Logits, zero: Logits) -> Logits:
    values: Logits = codes - zero[..., None]
    values *= scale[..., None]
    return values


def _scale_and_zero(least: Logits, most: Logits) -> tuple[Logits, Logits]:
    with np.errstate(invalid="ignore", over="ignore"):
        scale = (most - least) / _LARGEST_CODE
        scale = np.where(scale == 0, _FLAT, scale)
        return scale, -least / scale
