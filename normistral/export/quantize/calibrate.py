"""Rounding with regard to what flows through the model: one layer after the other, on the calibration's tokens.

The hidden states of all tokens go through a layer, whose linear parts collect the second moments of their inputs; the
layer's matrices are rounded; the states go through it once more, rounded, and are the next layer's inputs. So each
layer is rounded for the inputs that it will get, earlier layers' errors included.

What is held is one layer in float32, the hidden states, and the second moments (layerwise.py runs the layers).
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from normistral.export.checkpoint.open import Checkpoint
from normistral.export.quantize.gptq import round_with_hessian
from normistral.export.quantize.moments import collect_moments
from normistral.export.quantize.plan import Method, Plan
from normistral.export.quantize.scale_search import search_steps
from normistral.export.quantize.scheme import Grid, nearest_codes, restore
from normistral.export.quantize.tensor_store import RoundedTables
from normistral.export.reference.layerwise import LayeredModel
from normistral.progress import NoProgress, Stage

if TYPE_CHECKING:
    import torch


def round_layers(
    checkpoint: Checkpoint,
    plan: Plan,
    windows: list[list[int]],
    tables: RoundedTables,
    stage: Stage,
    finer: Set[str] = frozenset(),
) -> None:
    """Round every matrix inside the decoder's layers; embedding and output layer are not touched.

    Args:
        windows: the calibration's token ids, in pieces.
        finer: names of the matrices that are rounded to `plan.finer_grid`.
        tables: receives the matrices.
        stage: advanced by the number of weights done.

    Raises:
        ExportError: transformers cannot build the model, or it computes values that are no numbers.
        CheckpointError: the weights cannot be read.
    """
    import torch

    model = LayeredModel(checkpoint, NoProgress())
    passages = model.enter(windows)
    for index in range(model.layers):
        with model.open_layer(index) as layer, torch.inference_mode():
            with collect_moments(layer, full=plan.method == "gptq") as moments:
                for passage in passages:
                    model.run(layer, replace(passage))  # the original stays in front of the layer
            for name, moment in moments.items():
                weight = layer.get_parameter(f"{name}.weight")
                stored = f"{model.prefix(index)}{name}.weight"
                grid = (plan.finer_grid if stored in finer else plan.grid)(weight.shape[1])
                weight.copy_(_round(stored, weight, moment, plan.method, grid, tables))
                stage.advance(weight.numel())
            for passage in passages:
                model.run(layer, passage)


def _round(
    name: str, weight: torch.Tensor, moment: torch.Tensor, method: Method, grid: Grid, tables: RoundedTables
) -> torch.Tensor:
    """Round a matrix [out, in], keep it in `tables`, and return what it stands for now."""
    import torch

    rows = weight.numpy()
    importance = moment.diagonal() if method == "gptq" else moment
    steps = search_steps(rows, grid, np.ascontiguousarray(importance.numpy()))
    codes = round_with_hessian(rows, moment, steps, grid) if method == "gptq" else nearest_codes(rows, steps, grid)
    tables.write(name, codes, steps, grid)
    return torch.from_numpy(restore(codes, steps, grid))
