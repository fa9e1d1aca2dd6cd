"""Rounding with regard to what flows through the model: one layer after the other, on the calibration's tokens.

The hidden states of all tokens go through a layer, whose linear parts collect the second moments of their inputs; the
layer's matrices are rounded; the states go through it once more, rounded, and are the next layer's inputs. So each
layer is rounded for the inputs that it will get, earlier layers' errors included.

What is held is one layer in float32, the hidden states, and the second moments. The other layers are placeholders on
torch's "meta" device, and the checkpoint is mapped. The layers' arithmetic is transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from normistral.errors import ExportError, first_line
from normistral.export.checkpoint import Checkpoint
from normistral.export.families.base import OUTPUT_LAYER
from normistral.export.progress import Stage
from normistral.export.rounding.gptq import round_with_hessian
from normistral.export.rounding.grid import nearest_codes, restore
from normistral.export.rounding.plan import Plan
from normistral.export.rounding.scale_search import search_steps
from normistral.export.rounding.tables import RoundedTables
from normistral.export.tensor import Tensor, map_tensor
from normistral.export.weights import read_tensors, with_prefix

if TYPE_CHECKING:
    import torch
    from torch import nn


def round_layers(
    checkpoint: Checkpoint, plan: Plan, windows: list[list[int]], tables: RoundedTables, stage: Stage
) -> None:
    """Round every matrix inside the decoder's layers; embedding and output layer are not touched.

    Args:
        windows: the calibration's token ids, in pieces of one length.
        tables: receives the matrices.
        stage: advanced by the number of weights done.

    Raises:
        ExportError: transformers cannot build the model, or it computes values that are no numbers.
        CheckpointError: the weights cannot be read.
    """
    import torch

    with torch.no_grad():
        try:
            model = _build_placeholders(checkpoint)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as exc:
            raise ExportError(f"transformers cannot load the checkpoint: {first_line(exc)}") from exc
        family = checkpoint.family
        stored = with_prefix(read_tensors(checkpoint.folder), family)
        outer = {name for name in stored if not name.startswith(family.layer_prefix) and name != OUTPUT_LAYER}
        _materialise(model, {name: stored[name] for name in outer}, keep_dtype={family.embedding})
        layers: Any = model.get_submodule(family.layer_prefix.removesuffix("."))
        hidden, arguments = _enter(model, layers, windows)
        for index, layer in enumerate(layers):
            prefix = f"{family.layer_prefix}{index}."
            own = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
            _materialise(layer, {name: own[name] for name, _ in layer.named_parameters()})
            moments = _collect(layer, hidden, arguments, full=plan.method == "gptq")
            for name, moment in moments.items():
                weight = layer.get_submodule(name).weight
                weight.copy_(_round(f"{prefix}{name}.weight", weight, moment, plan, tables))
                stage.advance(weight.numel())
            for states in hidden:
                states.copy_(_forward(layer, states, arguments))
            layer.to("meta")


def _build_placeholders(checkpoint: Checkpoint) -> nn.Module:
    """The transformers model without a value in it; its buffers (rotary frequencies) are there."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    config.use_cache = False
    with init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def _materialise(module: nn.Module, tensors: dict[str, Tensor], keep_dtype: set[str] | None = None) -> None:
    """Give the module these parameters, in float32; those of `keep_dtype` stay the mapped file."""
    values = {
        name: map_tensor(tensor) if name in (keep_dtype or ()) else map_tensor(tensor).float().clone()
        for name, tensor in tensors.items()
    }
    module.load_state_dict(values, strict=False, assign=True)


class _Entered(Exception):  # noqa: N818  (no error: the way out of a forward pass whose first layer was reached)
    pass


def _enter(
    model: nn.Module, layers: nn.ModuleList, windows: list[list[int]]
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """What the model's own forward pass gives to its first layer.

    Returns:
        hidden states float32 [1, tokens, hidden] of each window, and the other arguments (mask, rotary angles, ALiBi),
        which are the same for all windows and layers.
    """
    import torch

    hidden: list[torch.Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden.append((positional[0] if positional else named.pop("hidden_states")).float().clone())
        # Only what comes by name: BLOOM's blocks take nothing else by position, and no cache is kept.
        arguments.update({name: value for name, value in named.items() if "past" not in name and "cache" not in name})
        raise _Entered

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    hooks = [
        embedding.register_forward_hook(lambda module, inputs, output: output.float()),
        layers[0].register_forward_pre_hook(catch, with_kwargs=True),
    ]
    try:
        for window in windows:
            try:
                model(torch.tensor([window]), use_cache=False)
            except _Entered:
                continue
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, arguments


def _forward(layer: nn.Module, states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    output = layer(states, **arguments)
    after: torch.Tensor = output[0] if isinstance(output, tuple) else output  # BLOOM's blocks give tuples
    return after


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


def _collect(
    layer: nn.Module, hidden: list[torch.Tensor], arguments: dict[str, Any], *, full: bool
) -> dict[str, torch.Tensor]:
    """Mean second moments of each linear module's inputs, by the module's name; one tensor where they are shared."""
    collector = _Collector(full)
    with _watch(layer, collector):
        for states in hidden:
            _forward(layer, states, arguments)
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
