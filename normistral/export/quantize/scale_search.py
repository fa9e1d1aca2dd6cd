"""Search of scales by weighted error: a column's weight is the mean square of its inputs.

After llama.cpp's `make_qx_quants` and `make_qkx2_quants` (ggml-quants.c): several ranges are tried; for
each, weights are rounded, then the scale is refitted to the rounded values, and the best result is kept. Unlike there
zero points are integers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from normistral.export.quantize.rtn import minmax_params, quantize
from normistral.export.quantize.scheme import QuantParams, QuantScheme, dequantize, round_scales
from normistral.hardware import plan_threads, read_machine

Floats = NDArray[np.float32]

# Of the span from lowest to highest weight: a narrower grid clips a few weights and is finer for all others.
_WIDTHS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_SHIFTS = (-1, 0, 1)  # of the zero point, in codes
_CHUNK_VALUES = 2**17  # of float32: what a core's cache holds with a few temporaries


def search_params(rows: Floats, scheme: QuantScheme, importance: Floats) -> QuantParams:
    """The best parameters found, with scales that the format holds exactly.

    Args:
        rows: float32 [rows, columns].
        importance: float32 [columns], not negative.
    """
    count = max(1, _CHUNK_VALUES // rows.shape[1])
    chunks = [rows[start : start + count] for start in range(0, len(rows), count)]
    with ThreadPoolExecutor(plan_threads(read_machine()), thread_name_prefix="search") as executor:
        found = list(executor.map(lambda chunk: _search(chunk, scheme, importance), chunks))
    return QuantParams(
        np.concatenate([params.scales for params in found]), np.concatenate([params.zero_points for params in found])
    )


def weighted_error(rows: Floats, params: QuantParams, scheme: QuantScheme, importance: Floats) -> Floats:
    """Sum over each block of importance × squared error after rounding to nearest: [rows, blocks]."""
    return _error(rows, quantize(rows, params, scheme), params, scheme, importance)


def _search(rows: Floats, scheme: QuantScheme, importance: Floats) -> QuantParams:
    widest = minmax_params(rows, scheme)
    best = round_scales(widest, scheme)
    least = weighted_error(rows, best, scheme, importance)
    for params in _candidates(widest, scheme):
        params = round_scales(_refit_scales(rows, quantize(rows, params, scheme), params, scheme, importance), scheme)
        error = weighted_error(rows, params, scheme, importance)
        better = error < least
        best = QuantParams(
            np.where(better, params.scales, best.scales), np.where(better, params.zero_points, best.zero_points)
        )
        least = np.where(better, error, least)
    return best


def _candidates(widest: QuantParams, scheme: QuantScheme) -> list[QuantParams]:
    scales, zeros = widest.scales, widest.zero_points
    if scheme.symmetric:  # turned round, the largest weight has one code less to go
        mirrored = np.float32(-scheme.middle / (scheme.middle - 1))
        return [QuantParams(scales * np.float32(width) * sign, zeros) for width in _WIDTHS for sign in (1, mirrored)]
    return [
        QuantParams(scales * np.float32(width), np.clip(zeros + np.float32(shift), 0, scheme.top))
        for width in _WIDTHS
        for shift in _SHIFTS
    ]


def _refit_scales(
    rows: Floats, qweight: NDArray[np.uint8], params: QuantParams, scheme: QuantScheme, importance: Floats
) -> QuantParams:
    """Least squares for the scale, of codes that stay."""
    shape = (len(rows), rows.shape[1] // scheme.group_size, scheme.group_size)
    levels = qweight.reshape(shape).astype(np.float32) - params.zero_points[..., None]
    weighted = levels * importance.reshape(1, *shape[1:])
    square = np.einsum("rbg,rbg->rb", weighted, levels)
    product = np.einsum("rbg,rbg->rb", weighted, rows.reshape(shape))
    return QuantParams(np.divide(product, square, out=params.scales.copy(), where=square > 0), params.zero_points)


def _error(
    rows: Floats, qweight: NDArray[np.uint8], params: QuantParams, scheme: QuantScheme, importance: Floats
) -> Floats:
    error = dequantize(qweight, params, scheme)
    error -= rows
    error *= error
    error *= importance
    return np.asarray(error.reshape(len(rows), -1, scheme.group_size).sum(axis=-1))
