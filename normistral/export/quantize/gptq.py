"""GPTQ: the error of every rounded weight is compensated in the following ones, to keep the layer's outputs.

Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
algorithm 1, with its activation order and damping. The parameters of every group are fixed before the first weight
changes ("static groups"), so that columns may be taken in any order while groups stay in the order of the formats.

GPTQ keeps the outputs for the inputs that come, errors of earlier layers included. A correction after Li et al. 2025,
"GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration" (arXiv 2504.02692), has the weights also take
over a part of those errors: the outputs approach what the checkpoint's own inputs would give.

It is written as Chee et al. 2023, "QuIP", show it to be the same (LDLQ, theorem 6): with H = U D Uᵀ, U of unit upper
triangular form, column k is rounded to nearest after the errors of the columns before it, times U's column k, were
added. That takes one Cholesky factor of H itself, and no inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from normistral.errors import ExportError
from normistral.export.quantize.scheme import QuantParams, QuantScheme

if TYPE_CHECKING:
    import torch

_DAMPINGS = (0.01, 0.1, 1.0)  # of the Hessian's mean diagonal: the paper's, and more where that cannot be factorized
_COLUMNS_AT_ONCE = 256  # corrected in one product for the errors of all columns before them
_COLUMNS_IN_TURN = 32  # of those, corrected column by column
_TO_INTEGERS = 1.5 * 2**23  # float32 has no halves there: adding it rounds to nearest, and faster than round()
_PANEL = 512  # columns of a Cholesky factor that LAPACK makes; the rest is products


@dataclass(frozen=True, slots=True)
class HessianFactor:
    """A factor of the Hessian of one kind of inputs; all matrices with these inputs share it.

    Attributes:
        order: int64 [columns], by growing mean square of the inputs; columns are rounded from the last to the first.
        feedback: [columns, columns] in that order, below the diagonal: U's coefficients; elsewhere anything. bfloat16
            or float32.
        correction: float32 [columns, columns] in that order, zeros on and above the diagonal: `correct` adds weights @
            correction. None: there is nothing to correct.
    """

    order: torch.Tensor
    feedback: torch.Tensor
    correction: torch.Tensor | None = None


def factorize(
    inputs: torch.Tensor, dtype: torch.dtype | None = None, own: torch.Tensor | None = None, share: float = 0.0
) -> HessianFactor:
    """The factor of the mean of x xᵀ over the inputs x, damped.

    Args:
        inputs: [tokens, columns].
        dtype: of the feedback, None is float32. The error of bfloat16's is far below a step of the grid.
        own: the inputs of the first tokens or all that the checkpoint's own layers give; None is no correction.
        share: of their difference from the inputs that come, which is corrected: 0 to 1.

    Raises:
        ExportError: the inputs are no numbers.
    """
    import torch

    squares = mean_squares(inputs)
    order = torch.argsort(squares, stable=True)
    inputs = inputs[:, order].float()
    for damping in _DAMPINGS:
        factor = _lower_products(inputs, inputs)
        mean = factor.diagonal().mean()
        factor.diagonal().add_(damping * mean if mean > 0 else 1.0)
        if _cholesky_in_place(factor):
            correction = None if own is None else _correction(factor, order, inputs, own, share)
            factor /= factor.diagonal().clone()
            return HessianFactor(order, factor.to(dtype or torch.float32), correction)
    raise ExportError("the calibration's second moments cannot be inverted", "use the recipe balanced or fast")


def _correction(
    factor: torch.Tensor, order: torch.Tensor, inputs: torch.Tensor, own: torch.Tensor, share: float
) -> torch.Tensor:
    """GPTAQ's correction, of which each column may use only those that are rounded later (algorithm 1, with alpha).

    With L Lᵀ the Hessian and D the moments of (x' - x) xᵀ, x' the checkpoint's own inputs, column q's part of the
    error is taken over by the columns k before it as row q of P = ((D L⁻ᵀ) below the diagonal) L⁻¹. What a column took
    over it hands on: W (1 - share P)⁻¹. (The paper's code hands on rounding errors, too.)

    Args:
        factor: L [columns, columns] on and below the diagonal, in `order`.
        inputs: [tokens, columns], in `order`.
    """
    import torch

    first = inputs[: len(own)]
    moments = _lower_products(own[:, order].float() - first, first).tril_(-1)  # what is above has no effect
    moments *= len(inputs) / len(first)
    taken = torch.linalg.solve_triangular(factor, moments.T, upper=False).T.tril(-1)
    taken = torch.linalg.solve_triangular(factor, taken, upper=False, left=False).tril_(-1)
    taken.mul_(-share)
    handed: torch.Tensor = torch.linalg.solve_triangular(taken, torch.eye(len(order)), upper=False, unitriangular=True)
    handed.diagonal().zero_()
    return handed


def correct(matrix: torch.Tensor, factor: HessianFactor) -> torch.Tensor:
    """Add the factor's correction, if it has one, to a matrix [rows, columns] in place. Returns the matrix."""
    if factor.correction is None:
        return matrix
    corrected = matrix[:, factor.order]
    for start in range(0, corrected.shape[1], _PANEL):
        stop = start + _PANEL
        corrected[:, start:stop] += corrected[:, start:] @ factor.correction[start:, start:stop]
    matrix[:, factor.order] = corrected
    return matrix


def mean_squares(inputs: torch.Tensor) -> torch.Tensor:
    """Mean square of every column of the inputs [tokens, columns], in float32.

    Raises:
        ExportError: they are no numbers.
    """
    import torch

    squares = inputs.float().square().mean(dim=0)
    if not torch.isfinite(squares).all():
        raise ExportError("the model computes values that are not numbers", "the checkpoint may be damaged")
    return squares


def quantize_gptq(
    rows: NDArray[np.float32], factor: HessianFactor, params: QuantParams, scheme: QuantScheme
) -> NDArray[np.uint8]:
    """Values for which (W - Wq) H (W - Wq)ᵀ is small: uint8 [rows, columns].

    Args:
        rows: float32 [rows, columns].
    """
    import torch

    order, feedback = factor.order, factor.feedback
    weights = torch.from_numpy(rows).T.contiguous()[order]  # [columns, rows]: one column at a time, in one piece
    errors = torch.empty(weights.shape, dtype=feedback.dtype)
    groups = (order // scheme.group_size).tolist()
    scales = torch.from_numpy(params.scales).T.contiguous()  # [groups, rows]
    zeros = torch.from_numpy(params.zero_points).T.contiguous()
    inverse, offsets = torch.where(scales == 0, 0.0, 1 / scales), zeros * scales
    zeros = zeros + _TO_INTEGERS  # not in place: with one group a row it is a view of the parameters
    qweight = torch.empty(weights.shape, dtype=torch.uint8)
    for stop in range(len(order), 0, -_COLUMNS_AT_ONCE):
        start = max(0, stop - _COLUMNS_AT_ONCE)
        wanted = weights[start:stop].clone()
        if stop < len(order):
            wanted += feedback[stop:, start:stop].T @ errors[stop:]
        for last in range(stop, start, -_COLUMNS_IN_TURN):
            first = max(start, last - _COLUMNS_IN_TURN)
            some = wanted[first - start : last - start]
            if last < stop:
                some += feedback[last:stop, first:last].T @ errors[last:stop]
            qvalues, lost = torch.empty_like(some), torch.empty_like(some)
            near = feedback[first:last, first:last].float()
            for column in reversed(range(len(some))):
                group, value = groups[first + column], some[column]
                qvalue = torch.addcmul(zeros[group], value, inverse[group], out=qvalues[column])
                qvalue.sub_(_TO_INTEGERS).clamp_(0, scheme.top)
                torch.add(weights[first + column], offsets[group], out=lost[column])
                lost[column].addcmul_(qvalue, scales[group], value=-1)
                some[:column].addr_(near[column, :column], lost[column])
            qweight[first:last], errors[first:last] = qvalues, lost
    back = torch.empty_like(qweight)
    back[order] = qweight
    return back.T.contiguous().numpy()


def _lower_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x yᵀ summed over pairs of `left` and `right` [tokens, columns], on and below the diagonal; above it, anything."""
    import torch

    columns = left.shape[1]
    step = max(_PANEL, columns // 16)
    sums = torch.empty(columns, columns)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        torch.mm(left[:, start:].T, right[:, start:stop], out=sums[start:, start:stop])
    return sums


def _cholesky_in_place(matrix: torch.Tensor) -> bool:
    """Replace the lower triangle by its Cholesky factor. False if it has none; the matrix is spoilt then.

    Panel by panel, because LAPACK's own runs at half the speed of oneDNN's products on AMD.
    """
    import torch

    size = len(matrix)
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        panel = matrix[start:, start:stop]
        if start:
            panel -= matrix[start:, :start] @ matrix[start:stop, :start].T
        corner, failed = torch.linalg.cholesky_ex(panel[: stop - start])
        if failed:
            return False
        panel[: stop - start] = corner
        if stop < size:
            inverse = torch.linalg.solve_triangular(corner, torch.eye(len(corner)), upper=False)
            panel[stop - start :] = panel[stop - start :] @ inverse.T
    return True
