"""Layer-by-layer quantization with calibration tokens.

The hidden states of all tokens pass through a layer, whose linear modules collect the second moments of their inputs;
the layer's matrices are quantized; the states pass through it once more, quantized, and are the next layer's inputs. So
each layer is quantized for the inputs that it will get, earlier layers' errors included.

Memory: one layer in float32, the hidden states, and the second moments (reference/layerwise.py runs the layers).
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from normistral.export.checkpoint.open import Checkpoint
from normistral.export.quantize.gptq import quantize_gptq
from normistral.export.quantize.plan import Method, QuantPlan
from normistral.export.quantize.rtn import quantize
from normistral.export.quantize.scale_search import search_params
from normistral.export.quantize.scheme import QuantScheme, dequantize
from normistral.export.quantize.tensor_store import QuantizedTensorStore
from normistral.export.reference.layerwise import LayeredModel
from normistral.progress import NoProgress, Stage

if TYPE_CHECKING:
    import torch
    from torch import nn


def quantize_layers(
    checkpoint: Checkpoint,
    plan: QuantPlan,
    windows: list[list[int]],
    quantized: QuantizedTensorStore,
    stage: Stage,
    in_int8: Set[str] = frozenset(),
) -> None:
    """Quantize every matrix inside the decoder's layers; embedding and output layer are left.

    Args:
        windows: the calibration's token ids, in pieces.
        in_int8: names of the matrices that take `plan.int8_scheme`.
        quantized: receives the matrices.
        stage: advanced by the number of weights done.

    Raises:
        ExportError: transformers cannot build the model, or it computes values that are no numbers.
        CheckpointError: the weights cannot be read.
    """
    import torch

    model = LayeredModel(checkpoint, NoProgress())
    sequences = model.embed(windows)
    for index in range(model.layers):
        with model.open_layer(index) as layer, torch.inference_mode():
            with collect_moments(layer, full=plan.method == "gptq") as moments:
                for sequence in sequences:
                    model.run(layer, replace(sequence))  # the original stays in front of the layer
            for name, moment in moments.items():
                weight = layer.get_parameter(f"{name}.weight")
                stored = f"{model.prefix(index)}{name}.weight"
                scheme = (plan.int8_scheme if stored in in_int8 else plan.scheme)(weight.shape[1])
                weight.copy_(_quantize(stored, weight, moment, plan.method, scheme, quantized))
                stage.advance(weight.numel())
            for sequence in sequences:
                model.run(layer, sequence)


def _quantize(
    name: str,
    weight: torch.Tensor,
    moment: torch.Tensor,
    method: Method,
    scheme: QuantScheme,
    quantized: QuantizedTensorStore,
) -> torch.Tensor:
    """Quantize a matrix [out, in], keep it in `quantized`, and return it dequantized."""
    import torch

    rows = weight.numpy()
    importance = moment.diagonal() if method == "gptq" else moment
    params = search_params(rows, scheme, np.ascontiguousarray(importance.numpy()))
    qweight = quantize_gptq(rows, moment, params, scheme) if method == "gptq" else quantize(rows, params, scheme)
    quantized.write(name, qweight, params, scheme)
    return torch.from_numpy(dequantize(qweight, params, scheme))


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


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Float32 matrix products by oneDNN while the context is open, as torch's precision "medium" has it.

    Without AMX they stay float32 to the last bits, and on AMD run at twice MKL's speed (237 against 109 GFLOP/s of one
    core with AVX512). With AMX inputs are multiplied in bfloat16 and summed in float32: what a calibration takes from
    them, moments and the next layer's inputs, is far coarser than that.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
