"""Rounding to nearest of whole matrices, for a format that NNCF does not round to: OpenVINO's groups of 8 bits."""

from __future__ import annotations

import numpy as np

from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor_reader import WeightReader
from normistral.export.quantize.scheme import Grid, Steps, nearest_codes, span, storable
from normistral.export.quantize.tensor_store import RoundedTables


def round_rest(checkpoint: Checkpoint, grid: Grid, tables: RoundedTables) -> None:
    """Round every matrix of the checkpoint that is not in `tables`, embedding and output layer too.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    reader = WeightReader(checkpoint.tensors)
    for name, shape in checkpoint.tensor_shapes.items():
        if len(shape) != 2 or name in tables.grids:
            continue
        codes, steps = [], []
        for rows in reader.blocks([name]):
            steps.append(storable(span(rows, grid), grid))
            codes.append(nearest_codes(rows, steps[-1], grid))
        scales = np.concatenate([some.scales for some in steps])
        zeros = np.concatenate([some.zero_points for some in steps])
        tables.write(name, np.concatenate(codes), Steps(scales, zeros), grid)
