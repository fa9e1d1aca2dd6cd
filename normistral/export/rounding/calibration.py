"""Rounding with regard to what flows through the model: one layer after the other, on the calibration's tokens.

The hidden states of all tokens go through a layer, whose linear parts collect the second moments of their inputs; the
layer's matrices are rounded; the states go through it once more, rounded, and are the next layer's inputs. So each
layer is rounded for the inputs that it will get, earlier layers' errors included.

What is held is one layer in float32, the hidden states, and the second moments (layerwise.py runs the layers).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from normistral.errors import ExportError
from normistral.export.checkpoint import Checkpoint
from normistral.export.layerwise import LayeredModel, Passage
from normistral.export.progress import NoProgress, Stage
from normistral.export.rounding.gptq import round_with_hessian
from normistral.export.rounding.grid import nearest_codes, restore
from normistral.export.rounding.plan import Plan
from normistral.export.rounding.scale_search import search_steps
from normistral.export.rounding.tables import RoundedTables

if TYPE_CHECKING:
    import torch
    from torch import nn


def round_layers(
    checkpoint: Checkpoint, plan: Plan, windows: list[list[int]], tables: RoundedTables, stage: Stage
) -> None:
    """Round every matrix inside the decoder's layers; embedding and output layer are not touched.

    Args:
        windows: the calibration's token ids, in pieces.
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
            moments = _collect(model, layer, passages, full=plan.method == "gptq")
            for name, moment in moments.items():
                weight = layer.get_parameter(f"{name}.weight")
                weight.copy_(_round(f"{model.prefix(index)}{name}.weight", weight, moment, plan, tables))
                stage.advance(weight.numel())
            for passage in passages:
                model.run(layer, passage)


@dataclass(slots=True)
class _Moments:
    """Sums over inputs x [columns]: of x xᵀ, or of its diagonal only."""

    full: bool
    total: torch.Tensor | None = None
    tokens: int = 0

    def add(self, inputs: torch.Tensor) -> None:
        inputs = inputs.reshape(-1, inputs.shape[-1])
        product = inputs.T @ inputs if self.full else inputs.square().sum(dim=0)
        self.total = product if self.total is None else self.total.add_(product)
        self.tokens += len(inputs)

    def mean(self) -> torch.Tensor:
        """Ends the sum: a second copy of the largest matrix here would be the second largest thing held."""
        assert self.total is not None
        return self.total.div_(self.tokens)


@dataclass(slots=True)
class _Collector:
    """Linear modules that are given one and the same tensor (queries, keys, values) share their moments."""

    full: bool
    moments: dict[str, _Moments] = field(default_factory=dict)
    _last: tuple[torch.Tensor, _Moments] | None = None

    def see(self, name: str, inputs: torch.Tensor) -> None:
        if self._last is not None and self._last[0] is inputs:
            self.moments.setdefault(name, self._last[1])
            return
        moments = self.moments.setdefault(name, _Moments(self.full))
        moments.add(inputs)
        self._last = (inputs, moments)


def _collect(model: LayeredModel, layer: nn.Module, passages: list[Passage], *, full: bool) -> dict[str, torch.Tensor]:
    """Mean second moments of each linear module's inputs, by the module's name; one tensor where they are shared."""
    collector = _Collector(full)
    with _watch(layer, collector):
        for passage in passages:
            model.run(layer, replace(passage))  # the original stays in front of the layer
    means = {id(moments): moments.mean() for moments in collector.moments.values()}
    return {name: means[id(moments)] for name, moments in collector.moments.items()}


@contextmanager
def _watch(layer: nn.Module, collector: _Collector) -> Iterator[None]:
    from torch import nn

    linear = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: collector.see(name, inputs[0]))
        for name, module in linear
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _round(name: str, weight: torch.Tensor, moment: torch.Tensor, plan: Plan, tables: RoundedTables) -> torch.Tensor:
    """Round a matrix [out, in], keep it in `tables`, and return what it stands for now."""
    import torch

    rows = weight.numpy()
    grid = plan.grid(rows.shape[1])
    importance = moment.diagonal() if plan.method == "gptq" else moment
    steps = search_steps(rows, grid, np.ascontiguousarray(importance.numpy()))
    if not (np.isfinite(steps.scales).all() and np.isfinite(rows).all()):
        raise ExportError(f"{name} has values that are not numbers", "the checkpoint may be damaged")
    codes = round_with_hessian(rows, moment, steps, grid) if plan.method == "gptq" else nearest_codes(rows, steps, grid)
    tables.write(name, codes, steps, grid)
    return torch.from_numpy(restore(codes, steps, grid))
