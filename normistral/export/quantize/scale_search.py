"""Search of scales by weighted error: a column's weight is the mean square of its inputs.

After llama.cpp's `make_qx_quants` and `make_qkx2_quants` (ggml-quants.c): several ranges are tried; for
each, weights are rounded, then the scale is refitted to the rounded values, and the best result is kept. Unlike there
zero points are integers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normistral.export.quantize.rtn import minmax_params, quantize
from normistral.export.quantize.scheme import QuantParams, QuantScheme, dequantize, round_scales, split_groups
from normistral.hardware import plan_threads, read_machine

Floats = NDArray[np.float32]

# Of the span from lowest to highest weight: a narrower grid clips a few weights and is finer for all others.
_WIDTHS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_STRETCHES = (0.96, 1.04)  # of the best of these, where there are zero points to shift too
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
    error = dequantize(quantize(rows, params, scheme), params, scheme)
    error -= rows
    error *= error
    error *= importance
    return np.asarray(error.reshape(len(rows), -1, scheme.group_size).sum(axis=-1))


@dataclass(slots=True)
class _Search:
    """The best parameters so far of some rows, and their errors [rows, blocks]."""

    rows: Floats  # [rows, blocks, group_size]
    importance: Floats  # [blocks, group_size]
    scheme: QuantScheme
    best: QuantParams
    least: Floats

    def try_params(self, params: QuantParams) -> None:
        """Keep these parameters, with the scale refitted to the rounded values, where they are better.

        With scale s, d the error of rounding in steps of s, and l the rounded values from the zero point: the error
        with scale s (1 + e) is s² (Σ d² + 2 e Σ l d + e² Σ l²), least for e = -Σ l d / Σ l².
        """
        zeros = params.zero_points[..., None]
        inverse = np.divide(np.float32(1), params.scales, out=np.zeros_like(params.scales), where=params.scales != 0)
        exact = self.rows * inverse[..., None]
        levels = exact + zeros
        np.rint(levels, out=levels)
        np.clip(levels, 0, self.scheme.top, out=levels)
        levels -= zeros
        lost = np.subtract(levels, exact, out=exact)
        weighted = levels * self.importance
        square, product = np.einsum("rbg,rbg->rb", weighted, levels), np.einsum("rbg,rbg->rb", weighted, lost)
        np.multiply(lost, lost, out=weighted)
        weighted *= self.importance
        change = np.divide(-product, square, out=np.zeros_like(square), where=square > 0)
        fitted = round_scales(QuantParams(params.scales * (1 + change), params.zero_points), self.scheme)
        change = (fitted.scales - params.scales) * inverse
        before = weighted.sum(axis=-1)
        error = params.scales**2 * (before + change * (2 * product + change * square))
        # By more than this difference of float32 may be wrong, as where all weights of a group are the same.
        better = error + np.float32(1e-6) * params.scales**2 * before < self.least
        self.best = QuantParams(
            np.where(better, fitted.scales, self.best.scales),
            np.where(better, fitted.zero_points, self.best.zero_points),
        )
        self.least = np.where(better, error, self.least)

    def shift_zero_points(self) -> None:
        """Try the best scales with zero points one value lower and higher."""
        best = self.best
        for shift in (-1, 1):
            self.try_params(QuantParams(best.scales, np.clip(best.zero_points + np.float32(shift), 0, self.scheme.top)))


def _search(rows: Floats, scheme: QuantScheme, importance: Floats) -> QuantParams:
    widest = minmax_params(rows, scheme)
    plain = round_scales(widest, scheme)
    search = _Search(
        split_groups(rows, scheme),
        importance.reshape(-1, scheme.group_size),
        scheme,
        plain,
        weighted_error(rows, plain, scheme, importance),
    )
    # Turned round, the largest weight of a symmetric scheme has one value less to go.
    mirrored = -scheme.middle / (scheme.middle - 1)
    for width in _WIDTHS:
        for sign in (1, mirrored) if scheme.symmetric else (1,):
            search.try_params(QuantParams(widest.scales * np.float32(width * sign), widest.zero_points))
    if not scheme.symmetric:
        search.shift_zero_points()
        best = search.best
        for width in _STRETCHES:
            search.try_params(QuantParams(best.scales * np.float32(width), best.zero_points))
        search.shift_zero_points()
    return search.best
