"""GPTQ: the error of every rounded weight is compensated in the following ones, to keep the layer's outputs.

Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
algorithm 1, with its activation order and damping. The parameters of every group are fixed before the first weight
changes ("static groups"), so that columns may be taken in any order while groups stay in the order of the formats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from normistral.errors import ExportError
from normistral.export.quantize.scheme import QuantParams, QuantScheme

if TYPE_CHECKING:
    import torch

DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper
_MAX_DAMPING = 1.0
_COLUMNS_AT_ONCE = 128


def quantize_gptq(
    rows: NDArray[np.float32], hessian: torch.Tensor, params: QuantParams, scheme: QuantScheme
) -> NDArray[np.uint8]:
    """Values for which (W - Wq) H (W - Wq)ᵀ is small: uint8 [rows, columns].

    Args:
        rows: float32 [rows, columns].
        hessian: float32 [columns, columns], mean of x xᵀ over the inputs x. It is not changed.

    Raises:
        ExportError: the inputs are no numbers.
    """
    import torch

    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order])  # upper triangle
    weights = torch.from_numpy(rows).T[order].contiguous()  # [columns, rows]: one column at a time, in one piece
    blocks = (order // scheme.group_size).tolist()
    scales = torch.from_numpy(params.scales).T.contiguous()  # [blocks, rows]
    zeros = torch.from_numpy(params.zero_points).T.contiguous()
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    qweight = torch.empty(weights.shape, dtype=torch.uint8)
    columns = len(order)
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, columns)
        errors = torch.empty(stop - start, weights.shape[1])
        for column in range(start, stop):
            block = blocks[column]
            qvalue = weights[column].mul(inverse[block]).add_(zeros[block]).round_().clamp_(0, scheme.top)
            qweight[column] = qvalue
            error = errors[column - start]
            torch.sub(weights[column], qvalue.sub_(zeros[block]).mul_(scales[block]), out=error)
            error /= factor[column, column]
            weights[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
        weights[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    back = torch.empty_like(qweight)
    back[order] = qweight
    return np.ascontiguousarray(back.T.numpy())


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor U of the inverse: Uᵀ U = H⁻¹. `hessian` is used up.

    With rows and columns in reverse order H is L Lᵀ, and L⁻¹ in reverse order again is U. So the inverse itself is
    never formed: LAPACK's routine for it (potri) runs at a sixth of the speed of these two.

    Columns that nothing is ever multiplied with have zeros there: damping makes them ordinary.
    """
    import torch

    mean = hessian.diagonal().mean()
    if not torch.isfinite(mean):
        raise ExportError("the model computes values that are not numbers", "the checkpoint may be damaged")
    if mean == 0:
        return torch.eye(len(hessian))
    hessian = hessian.flip(0, 1)
    damping = DAMPING
    hessian.diagonal().add_(damping * mean)
    while damping <= _MAX_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            del hessian
            inverse = torch.eye(len(lower))
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            return inverse.flip(0, 1)
        hessian.diagonal().add_(9 * damping * mean)  # ten times as much in all
        damping *= 10
    raise ExportError("the calibration's second moments cannot be inverted", "use the recipe balanced or fast")
