"""Rounding to nearest (RTN): group parameters from minimum and maximum, no calibration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor import WeightReader
from normistral.export.quantize.scheme import (
    SMALLEST_SCALE,
    QuantizedTensor,
    QuantParams,
    QuantScheme,
    pack,
    round_scales,
    split_groups,
)
from normistral.export.quantize.tensor_store import QuantizedTensorStore


def quantize_rtn(rows: NDArray[np.float32], scheme: QuantScheme) -> QuantizedTensor:
    """Quantize rows by rounding to nearest.

    Args:
        rows: float32 [rows, columns]; columns a multiple of the group size. A block with a value that is no finite
            number gets a scale that is none either.
    """
    params = minmax_params(rows, scheme)
    return pack(quantize(rows, params, scheme), params, scheme)


@np.errstate(invalid="ignore")  # of values that are no numbers: the scales say so
def minmax_params(rows: NDArray[np.float32], scheme: QuantScheme) -> QuantParams:
    """Parameters that span each group from its lowest weight to its highest.

    Symmetric: the weight of the largest magnitude in a group takes the value 0, which is one step farther from the
    zero point than the highest value, so that no value is left unused.
    """
    blocks = split_groups(rows, scheme)
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)  # [rows, blocks]
    if scheme.symmetric:
        scales = np.where(-low >= high, low, high) / np.float32(-scheme.middle)
        zeros = np.full_like(scales, scheme.middle)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)  # zero itself stays exact
        scales = (high - low) / np.float32(scheme.top)
        zeros = np.rint(np.clip(-low / np.where(scales == 0, 1, scales), 0, scheme.top)).astype(np.float32)
    scales[np.abs(scales) < SMALLEST_SCALE] = 0
    return QuantParams(scales.astype(np.float32, copy=False), zeros)


@np.errstate(invalid="ignore")
def quantize(rows: NDArray[np.float32], params: QuantParams, scheme: QuantScheme) -> NDArray[np.uint8]:
    """Round each weight to the nearest value: uint8 [rows, columns], unpacked."""
    inverse = np.divide(np.float32(1), params.scales, out=np.zeros_like(params.scales), where=params.scales != 0)
    qweight = split_groups(rows, scheme) * inverse[..., None]
    qweight += params.zero_points[..., None]
    np.rint(qweight, out=qweight)
    np.clip(qweight, 0, scheme.top, out=qweight)
    return qweight.astype(np.uint8).reshape(rows.shape)


def quantize_remaining(checkpoint: Checkpoint, scheme: QuantScheme, quantized: QuantizedTensorStore) -> None:
    """Quantize every matrix that is not in `quantized` yet, embedding and output layer included.

    For OpenVINO's groups of 8 bits, which NNCF does not have.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    reader = WeightReader(checkpoint.tensors)
    for name, shape in checkpoint.tensor_shapes.items():
        if len(shape) != 2 or name in quantized.schemes:
            continue
        qweight, params = [], []
        for rows in reader.blocks(name):
            params.append(round_scales(minmax_params(rows, scheme), scheme))
            qweight.append(quantize(rows, params[-1], scheme))
        scales = np.concatenate([some.scales for some in params])
        zeros = np.concatenate([some.zero_points for some in params])
        quantized.write(name, np.concatenate(qweight), QuantParams(scales, zeros), scheme)
