"""Second moments of what linear modules are given: what a calibration knows of the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


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


def linear_modules(layer: nn.Module) -> dict[str, nn.Linear]:
    """The matrices of a layer that are rounded, by the names of their modules."""
    from torch import nn

    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


@contextmanager
def collect_moments(layer: nn.Module, *, full: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Watches what runs through a layer while the context is open.

    Args:
        full: the matrix of moments [columns, columns]; otherwise its diagonal [columns].

    Yields:
        a dict that gets, at the end, the mean moments of each linear module's inputs by the module's name; one tensor
        where they are shared.
    """
    collector, found = _Collector(full), dict[str, "torch.Tensor"]()
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: collector.see(name, inputs[0]))
        for name, module in linear_modules(layer).items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    means = {id(moments): moments.mean() for moments in collector.moments.values()}
    found |= {name: means[id(moments)] for name, moments in collector.moments.items()}
