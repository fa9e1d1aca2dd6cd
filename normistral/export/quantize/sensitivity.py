"""Mixed precision: estimated loss of each matrix in 4 bits, and selection of those that take 8.

To second order, rounding a matrix W to W + D changes the model's answer for a token by ½ E[(Σ g·D x)²] nats of KL
divergence, x being the matrix's inputs and g the gradient at its outputs of the log-probability of a token drawn from
the model's own answer (the expectation is the Fisher information in direction D). The sum over tokens inside the square
is left out: it needs thousands of draws to be seen through its noise.

The states go forward through the layers and the gradients back, with one layer in memory; what waits is the states in
front of every layer. Source of the use for bits: Dong et al. 2020, "HAWQ-V2: Hessian Aware trace-Weighted Quantization
of Neural Networks", with the direction of the rounding error in place of the trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from normistral.errors import ExportError
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.quantize.calibrate import hooked_modules
from normistral.export.quantize.plan import QuantPlan
from normistral.export.quantize.rtn import quantize
from normistral.export.quantize.scale_search import search_params
from normistral.export.quantize.scheme import dequantize
from normistral.export.reference.layerwise import LayeredModel, SequenceState
from normistral.progress import NoProgress, Stage

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(slots=True)
class Sensitivity:
    """One matrix: estimated `loss` in nats per token in the plan's low-bit scheme; number of `weights`."""

    weights: int
    loss: float = 0.0


def select_int8(sensitivities: Mapping[str, Sensitivity], ratio: float) -> frozenset[str]:
    """Names of the matrices with the largest loss per byte, until all but `ratio` of the weights are selected.

    A weight costs the same bytes in every matrix, and what 8 bits lose is nothing beside 4 (a 256th): so the gain by
    byte is the loss by weight. A matrix that does not fit in the rest is skipped for smaller ones.
    """
    left = round((1 - ratio) * sum(matrix.weights for matrix in sensitivities.values()))
    chosen = set()
    for name, matrix in sorted(sensitivities.items(), key=lambda item: (-item[1].loss / item[1].weights, item[0])):
        if matrix.weights <= left:
            chosen.add(name)
            left -= matrix.weights
    return frozenset(chosen)


def measure_sensitivity(
    checkpoint: Checkpoint, plan: QuantPlan, windows: list[list[int]], stage: Stage
) -> dict[str, Sensitivity]:
    """Estimated loss of each matrix inside the layers, by its name in the checkpoint.

    Args:
        windows: token ids, in pieces.
        stage: advanced by the number of layers done, which is twice each.

    Raises:
        ExportError: transformers cannot build the model, or it computes values that are no numbers.
        CheckpointError: the weights cannot be read.
    """
    model = LayeredModel(checkpoint, NoProgress())
    sequences = model.embed(*([window] for window in windows))
    states: list[list[torch.Tensor]] = []  # in front of every layer
    moments: list[dict[str, torch.Tensor]] = []
    for index in range(model.layers):
        states.append([sequence.hidden for sequence in sequences])
        with model.open_layer(index) as layer, _collect_mean_squares(layer) as found:
            for sequence in sequences:
                model.run(layer, sequence)
        moments.append(found)
        stage.advance(1)
    gradients = _gradients_at_the_end(model, sequences)
    measured: dict[str, Sensitivity] = {}
    for index in reversed(range(model.layers)):
        with model.open_layer(index) as layer:
            errors = {name: _quantization_error(layer, name, moment, plan) for name, moment in moments.pop().items()}
            with _watch(layer, errors) as sensitivities:
                gradients = [
                    _step_back(model, layer, sequence, hidden, gradient)
                    for sequence, hidden, gradient in zip(sequences, states.pop(), gradients, strict=True)
                ]
            measured |= {f"{model.prefix(index)}{name}.weight": matrix for name, matrix in sensitivities.items()}
        stage.advance(1)
    tokens = sum(map(len, windows))
    for matrix in measured.values():
        matrix.loss /= 2 * tokens
    return measured


def _gradients_at_the_end(model: LayeredModel, sequences: list[SequenceState]) -> list[torch.Tensor]:
    """Gradients at the last layer's outputs of the log-probability of tokens drawn from the model's own answers."""
    import torch

    draw = torch.Generator().manual_seed(0)
    gradients: list[torch.Tensor] = []
    with model.open_output() as output:
        for sequence in sequences:
            hidden = sequence.hidden.requires_grad_()
            logits = output(hidden)
            answers = logits.detach().softmax(-1)  # [tokens, vocabulary]
            if not torch.isfinite(answers).all():
                raise ExportError("the model computes values that are not numbers", "the checkpoint may be damaged")
            drawn = torch.multinomial(answers, 1, generator=draw)
            at_logits = answers.neg_().scatter_add_(1, drawn, torch.ones(drawn.shape))
            gradients += torch.autograd.grad(logits, hidden, at_logits)
    return gradients


@contextmanager
def _collect_mean_squares(layer: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Yields a dict that gets, when the context ends, the mean squares [columns] of each linear module's inputs."""
    sums, tokens, found = dict[str, "torch.Tensor"](), Counter[str](), dict[str, "torch.Tensor"]()

    def see(name: str, inputs: torch.Tensor) -> None:
        inputs = inputs.reshape(-1, inputs.shape[-1])
        squares = inputs.square().sum(dim=0)
        sums[name] = squares if name not in sums else sums[name].add_(squares)
        tokens[name] += len(inputs)

    with hooked_modules(layer, before=see):
        yield found
    found |= {name: squares / tokens[name] for name, squares in sums.items()}


def _quantization_error(layer: nn.Module, name: str, moment: torch.Tensor, plan: QuantPlan) -> torch.Tensor:
    """Error of rounding a matrix [out, in] to nearest with searched scales."""
    import torch

    weight = layer.get_parameter(f"{name}.weight")
    rows, scheme = weight.numpy(), plan.scheme(weight.shape[1])
    params = search_params(rows, scheme, moment.numpy())
    return torch.from_numpy(dequantize(quantize(rows, params, scheme), params, scheme)).sub_(weight)


@contextmanager
def _watch(layer: nn.Module, errors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, Sensitivity]]:
    """Sums of (g·D x)² over the tokens that run forward and back through a layer while the context is open."""
    sums = {name: Sensitivity(error.numel()) for name, error in errors.items()}

    def see(name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        inputs = inputs.detach()

        def add(gradient: torch.Tensor) -> None:
            change = (inputs @ errors[name].T).mul_(gradient).sum(dim=-1)
            sums[name].loss += change.double().square().sum().item()

        output.register_hook(add)  # type: ignore[no-untyped-call]

    with hooked_modules(layer, after=see):
        yield sums


def _step_back(
    model: LayeredModel, layer: nn.Module, sequence: SequenceState, hidden: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """The gradient at a layer's inputs, from the one at its outputs."""
    import torch

    sequence.hidden = hidden.requires_grad_()
    (before,) = torch.autograd.grad(model.call(layer, sequence), hidden, gradient)
    return before
