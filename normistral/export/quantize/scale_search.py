"""Scales that lose least where it matters: each column's error counts by the mean square of what it is multiplied with.

After llama.cpp's `make_qx_quants` and `make_qkx2_quants` (ggml-quants.c): several widths of the grid are tried, for
each the codes are taken, then for these codes the scale that fits them best, and the best of all is kept. Unlike there
zero points are whole codes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from normistral.export.quantize.scheme import Grid, Steps, nearest_codes, restore, span, storable
from normistral.hardware import plan_threads, read_machine

Floats = NDArray[np.float32]

# Of the span from lowest to highest weight: a narrower grid clips a few weights and is finer for all others.
_WIDTHS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_SHIFTS = (-1, 0, 1)  # of the zero point, in codes
_CHUNK_VALUES = 2**17  # of float32: what a core's cache holds with a few temporaries


def search_steps(rows: Floats, grid: Grid, importance: Floats) -> Steps:
    """The best steps found, with scales that the format holds exactly.

    Args:
        rows: float32 [rows, columns].
        importance: float32 [columns], not negative.
    """
    count = max(1, _CHUNK_VALUES // rows.shape[1])
    chunks = [rows[start : start + count] for start in range(0, len(rows), count)]
    with ThreadPoolExecutor(plan_threads(read_machine()), thread_name_prefix="search") as executor:
        found = list(executor.map(lambda chunk: _search(chunk, grid, importance), chunks))
    return Steps(
        np.concatenate([steps.scales for steps in found]), np.concatenate([steps.zero_points for steps in found])
    )


def weighted_error(rows: Floats, steps: Steps, grid: Grid, importance: Floats) -> Floats:
    """Sum over each block of importance × squared error after rounding to nearest: [rows, blocks]."""
    return _error(rows, nearest_codes(rows, steps, grid), steps, grid, importance)


def _search(rows: Floats, grid: Grid, importance: Floats) -> Steps:
    widest = span(rows, grid)
    best = storable(widest, grid)
    least = weighted_error(rows, best, grid, importance)
    for steps in _candidates(widest, grid):
        steps = storable(_refit(rows, nearest_codes(rows, steps, grid), steps, grid, importance), grid)
        error = weighted_error(rows, steps, grid, importance)
        better = error < least
        best = Steps(np.where(better, steps.scales, best.scales), np.where(better, steps.zero_points, best.zero_points))
        least = np.where(better, error, least)
    return best


def _candidates(widest: Steps, grid: Grid) -> list[Steps]:
    scales, zeros = widest.scales, widest.zero_points
    if grid.symmetric:  # turned round, the largest weight has one code less to go
        mirrored = np.float32(-grid.middle / (grid.middle - 1))
        return [Steps(scales * np.float32(width) * sign, zeros) for width in _WIDTHS for sign in (1, mirrored)]
    return [
        Steps(scales * np.float32(width), np.clip(zeros + np.float32(shift), 0, grid.top))
        for width in _WIDTHS
        for shift in _SHIFTS
    ]


def _refit(rows: Floats, codes: NDArray[np.uint8], steps: Steps, grid: Grid, importance: Floats) -> Steps:
    """Least squares for the scale, of codes that stay."""
    shape = (len(rows), rows.shape[1] // grid.group_size, grid.group_size)
    levels = codes.reshape(shape).astype(np.float32) - steps.zero_points[..., None]
    weighted = levels * importance.reshape(1, *shape[1:])
    square = np.einsum("rbg,rbg->rb", weighted, levels)
    product = np.einsum("rbg,rbg->rb", weighted, rows.reshape(shape))
    return Steps(np.divide(product, square, out=steps.scales.copy(), where=square > 0), steps.zero_points)


def _error(rows: Floats, codes: NDArray[np.uint8], steps: Steps, grid: Grid, importance: Floats) -> Floats:
    error = restore(codes, steps, grid)
    error -= rows
    error *= error
    error *= importance
    return np.asarray(error.reshape(len(rows), -1, grid.group_size).sum(axis=-1))
