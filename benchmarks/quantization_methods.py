"""Loss of int4 methods at the same bytes: changes to GPTQ, each alone, in exact arithmetic; `best` is the package's.

    python benchmarks/quantization_methods.py MODEL --text en=FILE --text nb=FILE --cache FOLDER --out OUT.jsonl \\
        [--method NAME ...] [--seed N ...] [--group-size N ...]
    python benchmarks/quantization_methods.py --report OUT.jsonl

One run is one method, one seed and one group size. It quantizes the matrices inside the layers with the package's own
functions, layer by layer and for the inputs that the quantized layers before give; the dequantized matrices run in
transformers in float32 (embedding and output layer stay as they are). KL divergence from the checkpoint's own float32
logits, in nats, on the first 2,048 tokens of each text in windows of 512. Every run appends one line to OUT.jsonl, and
runs that stand there are left out: the same command goes on where it ended, and several may run side by side.

Seed 0 takes the package's calibration tokens; every other seed rotates each text by a random number of tokens first, so
that other windows are drawn from the same texts. A method's figures are compared with GPTQ's of the same seed, or
with those of `--beside`.

The demo model's weights lie on llama.cpp's Q4_1 grid (blocks of 32): groups of 32 prove nothing there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from rounding_study import WINDOW_TOKENS, compare, load_reference, load_windows, predict_with

from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import Checkpoint, open_checkpoint
from normistral.export.quantize import gptq, plan
from normistral.export.quantize.calibrate import fast_matmul, linear_modules
from normistral.export.quantize.gptq import HessianFactor, correct, factorize, mean_squares, quantize_gptq
from normistral.export.quantize.rtn import quantize
from normistral.export.quantize.scale_search import search_params
from normistral.export.quantize.scheme import QuantParams, QuantScheme, dequantize, round_scales
from normistral.export.reference.layerwise import LayeredModel, SequenceState, set_parameter
from normistral.export.reference.model import load_model
from normistral.progress import NoProgress

Rows = NDArray[np.float32]
TokenWeights = Mapping[str, torch.Tensor]  # of each matrix: [windows, tokens], mean 1
TEXT_WINDOWS = 4


@dataclass(frozen=True, slots=True)
class Method:
    """A change to GPTQ; the defaults are GPTQ with searched scales, `best` without its correction.

    Attributes:
        nearest: round to nearest with the searched scales, without GPTQ (the recipe `balanced`, with zero points).
        tokens: of the calibration.
        damping: of the Hessian, as a share of its mean diagonal.
        by_moments: take columns by their mean squares; else in their own order.
        inputs: the matrix is quantized for: those that the quantized layers before it give, or the checkpoint's own.
        correction: of the error of the inputs, X' - X with X' the checkpoint's own inputs. "gptaq": Li et al. 2025
            (arXiv 2504.02692): each column's W_q (X' - X)_q is taken over by the columns that are still to come.
            "qep": Arai and Ichikawa 2025 (arXiv 2504.09629): the least-squares fit of W X' by all columns of X.
        alpha: share of the correction.
        corrected_share: of the windows that the correction is taken from; only these pass through the checkpoint's own
            layers.
        uncorrected: modules without a correction.
        weights: of the tokens in the Hessian. "answer": mean square of the gradient at the matrix's outputs of a drawn
            answer's log-probability (Kim et al. 2025, "GuidedQuant", with one group). "layer": the same of a random
            direction of the layer's output, relative to its size. "states": one over the mean square
            of the state in front of the layer. "skip1": none for a window's first token.
        exponent: of these weights.
        heads: a Hessian for each head of queries, keys and values, of that head's weights.
        conditional: search scales by the variance of an input given those still to come, which is the price of a
            column's rounding in GPTQ; else by its mean square.
        stretch: factor on the scales that the search found.
        researches: times that scales are searched again for the weights as GPTQ had them when it rounded them, with the
            errors of other columns added.
        refits: times that the scales are fitted to the values by least squares in the Hessian's metric.
        requantize: run GPTQ again with refitted scales, and refit once more.
        sweeps: of coordinate descent over the values.
        awq: scale channels by a power of their mean magnitude, the best of a few (Lin et al. 2023, "AWQ").
    """

    nearest: bool = False
    tokens: int = plan.CALIBRATION_TOKENS
    damping: float = 0.01
    by_moments: bool = True
    inputs: Literal["quantized", "original"] = "quantized"
    correction: Literal["gptaq", "qep"] | None = None
    alpha: float = 0.0
    corrected_share: float = 1.0
    uncorrected: tuple[str, ...] = ()
    weights: Literal["answer", "layer", "states", "skip1"] | None = None
    exponent: float = 1.0
    heads: bool = False
    conditional: bool = False
    stretch: float = 1.0
    researches: int = 0
    refits: int = 0
    requantize: bool = False
    sweeps: int = 0
    awq: bool = False


GPTQ = Method()
BEST = replace(GPTQ, correction="gptaq", alpha=plan.CORRECTION, uncorrected=("down_proj",))
METHODS: dict[str, Method] = {
    "gptq": GPTQ,
    "best": BEST,
    "balanced-asymmetric": replace(GPTQ, nearest=True),
    "gptaq-0.25": replace(GPTQ, correction="gptaq", alpha=0.25),
    "gptaq-0.5": replace(GPTQ, correction="gptaq", alpha=0.5),
    "gptaq-1": replace(GPTQ, correction="gptaq", alpha=1.0),
    "best-0.25": replace(BEST, alpha=0.25),
    "best-0.75": replace(BEST, alpha=0.75),
    "best-half": replace(BEST, corrected_share=0.5),
    "best-0.25-half": replace(BEST, alpha=0.25, corrected_share=0.5),
    "best-0.25-4096": replace(BEST, alpha=0.25, tokens=4096),
    "best-4096": replace(BEST, tokens=4096),
    "best-16384": replace(BEST, tokens=16384),
    "best-refit": replace(BEST, refits=1),
    "best-descent": replace(BEST, sweeps=1),
    "qep-0.25": replace(GPTQ, correction="qep", alpha=0.25),
    "qep-0.5": replace(GPTQ, correction="qep", alpha=0.5),
    "awq": replace(GPTQ, awq=True),
    "best-awq": replace(BEST, awq=True),
    "own-order": replace(GPTQ, by_moments=False),
    "refit": replace(GPTQ, refits=1),
    "refit-requantize": replace(GPTQ, refits=1, requantize=True),
    "descent": replace(GPTQ, sweeps=1),
    "damping-0.003": replace(GPTQ, damping=0.003),
    "damping-0.03": replace(GPTQ, damping=0.03),
    "damping-0.1": replace(GPTQ, damping=0.1),
    "tokens-4096": replace(GPTQ, tokens=4096),
    "tokens-16384": replace(GPTQ, tokens=16384),
    "original-inputs": replace(GPTQ, inputs="original"),
    "conditional": replace(GPTQ, conditional=True),
    "stretch-1.03": replace(GPTQ, stretch=1.03),
    "research": replace(GPTQ, conditional=True, researches=1),
    "skip1": replace(GPTQ, weights="skip1"),
    "layer-weights": replace(GPTQ, weights="layer"),
    "layer-weights-heads": replace(GPTQ, weights="layer", heads=True),
    "state-weights": replace(GPTQ, weights="states"),
    "answer-weights": replace(GPTQ, weights="answer"),
    "answer-weights-root": replace(GPTQ, weights="answer", exponent=0.5),
    "answer-weights-heads": replace(GPTQ, weights="answer", heads=True),
}


@dataclass(slots=True)
class Inputs:
    """Inputs of one matrix: `values` [tokens, columns], each row times the root of its token's weight.

    Attributes:
        squares: mean square of every column [columns].
        own: the checkpoint's own inputs, weighted alike [tokens or the first of them, columns]; None without a
            correction.
    """

    values: torch.Tensor
    squares: torch.Tensor
    factor: HessianFactor
    own: torch.Tensor | None
    method: Method

    def variances(self) -> torch.Tensor:
        """Of each column, damped, given those that are rounded after it: [columns], in the factor's order.

        H = F diag(v) Fᵀ, so diag(H) = (F ∘ F) v.
        """
        diagonal = (self.squares + self.method.damping * self.squares.mean())[self.factor.order]
        return torch.linalg.solve_triangular(self.triangle().square(), diagonal[:, None], upper=False)[:, 0]

    def triangle(self) -> torch.Tensor:
        """F: of unit lower triangular form [columns, columns], in the factor's order."""
        return self.factor.feedback.float().tril(-1) + torch.eye(len(self.squares))

    def hessian(self) -> torch.Tensor:
        """Damped, in the order of the matrix [columns, columns]."""
        sums = self.values.T @ self.values / len(self.values)
        sums.diagonal().add_(self.method.damping * self.squares.mean())
        return sums


def quantize_model(
    checkpoint: Checkpoint, method: Method, group_size: int, windows: list[list[int]], weights: TokenWeights
) -> dict[str, torch.Tensor]:
    """Every matrix inside the layers, quantized and dequantized, by its name in the checkpoint."""
    model = LayeredModel(checkpoint, NoProgress())
    (states,) = model.embed(windows)
    own_windows = windows[: max(1, round(len(windows) * method.corrected_share))]
    own = model.embed(own_windows)[0] if method.correction or method.inputs == "original" else None
    done: dict[str, torch.Tensor] = {}
    head_dim = checkpoint.architecture.head_dim
    for index in range(model.layers):
        rounder = LayerRounder(model, index, method, group_size, done)
        if own is not None or method.awq:
            with model.open_layer(index) as layer:
                rounder.own = record_inputs(model, layer, own or replace(states))
        if method.weights == "layer":
            with model.open_layer(index) as layer:
                rounder.weights = layer_weights(model, layer, states, head_dim if method.heads else None)
        elif method.weights == "states":
            each = normalized(1 / states.hidden.square().mean(dim=-1))
            rounder.weights = dict.fromkeys(linear_modules(model.layer(index)), each)
        elif method.weights == "skip1":
            rounder.weights = dict.fromkeys(linear_modules(model.layer(index)), first_token_out(states))
        elif method.weights == "answer":
            rounder.weights = {name: weights[rounder.stored(name)] for name in linear_modules(model.layer(index))}
        with (
            model.open_layer(index, without=rounder.matrices) as layer,
            torch.inference_mode(),
            rounder.watch(layer),
        ):
            model.run(layer, states)
    return done


def record_inputs(model: LayeredModel, layer: torch.nn.Module, sequence: SequenceState) -> dict[str, torch.Tensor]:
    """Inputs [windows, tokens, columns] of a layer's linear modules, while `sequence` passes."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, given, name=name: found.update({name: given[0]}))
        for name, module in linear_modules(layer).items()
    ]
    with torch.inference_mode():
        model.run(layer, sequence)
    for hook in hooks:
        hook.remove()
    return found


@dataclass(slots=True)
class LayerRounder:
    """Quantizes the linear modules of layer `index`, each when its inputs come, as the package's calibration does.

    Attributes:
        done: receives the dequantized matrices.
        own: the checkpoint's own inputs of each module, where the method asks for them; with `awq` the same tensor
            tells modules that share their inputs.
        weights: of the tokens, for each module.
    """

    model: LayeredModel
    index: int
    method: Method
    group_size: int
    done: dict[str, torch.Tensor]
    own: dict[str, torch.Tensor] | None = None
    weights: dict[str, torch.Tensor] | None = None
    _seen: tuple[torch.Tensor, Inputs] | None = None
    _scales: dict[int, torch.Tensor] | None = None

    @property
    def matrices(self) -> set[str]:
        """The parameters of the layer that this quantizes."""
        return {f"{name}.weight" for name in linear_modules(self.model.layer(self.index))}

    def stored(self, name: str) -> str:
        """A module's matrix in the checkpoint."""
        return f"{self.model.prefix(self.index)}{name}.weight"

    @contextmanager
    def watch(self, layer: torch.nn.Module) -> Iterator[None]:
        """Quantize what runs while the context is open."""
        hooks = [
            module.register_forward_pre_hook(lambda module, given, name=name: self._before(name, given[0]))
            for name, module in linear_modules(layer).items()
        ]
        yield
        for hook in hooks:
            hook.remove()

    def _before(self, name: str, tensor: torch.Tensor) -> None:
        weights = None if self.weights is None else self.weights[name]
        rows = self.model.read_matrix(self.stored(name))
        scheme = self._scheme(rows)
        if weights is not None and weights.dim() == 3:
            parts = zip(rows.chunk(weights.shape[-1]), weights.unbind(-1), strict=True)
            restored = torch.cat(
                [torch.from_numpy(round_matrix(part, self._take(name, tensor, each), scheme)) for part, each in parts]
            )
        else:
            restored = self._round(name, rows, self._take(name, tensor, weights), scheme)
        self.done[self.stored(name)] = restored
        set_parameter(self.model.layer(self.index), f"{name}.weight", restored)

    def _scheme(self, rows: torch.Tensor) -> QuantScheme:
        return plan.QuantPlan("gptq", 4, self.group_size, False, float16_scales=True).scheme(rows.shape[1])

    def _round(self, name: str, rows: torch.Tensor, inputs: Inputs, scheme: QuantScheme) -> torch.Tensor:
        # Not those that the attention's output has: several of its heads share a head of values, which would take them.
        scales = self._channel_scales(name, inputs) if self.method.awq and not name.endswith("o_proj") else None
        if scales is not None:
            inputs = scaled(inputs, scales)
            rows = rows * scales
        restored = torch.from_numpy(round_matrix(rows, inputs, scheme))
        # The norm or matrix before it takes the scales over.
        return restored if scales is None else restored / scales

    def _take(self, name: str, tensor: torch.Tensor, weights: torch.Tensor | None) -> Inputs:
        if self._seen is not None and self._seen[0] is tensor and weights is None:
            return self._seen[1]
        values = flat(tensor)
        own = None
        if self.own is not None and self.method.correction and not name.endswith(self.method.uncorrected):
            own = flat(self.own[name])
        if self.own is not None and self.method.inputs == "original":
            values = flat(self.own[name])
        if weights is not None:
            roots = weights.reshape(-1, 1).sqrt()
            values = values * roots
            own = None if own is None else own * roots[: len(own)]
        self._seen = tensor, make_inputs(values, own, self.method)
        return self._seen[1]

    def _channel_scales(self, name: str, inputs: Inputs) -> torch.Tensor:
        """The scales of the channels that this module reads; all modules with the same inputs share them."""
        assert self.own is not None
        key = id(self.own[name])
        self._scales = self._scales or {}
        if key not in self._scales:
            sharing = [other for other, tensor in self.own.items() if tensor is self.own[name]]
            rows = torch.cat([self.model.read_matrix(self.stored(other)) for other in sharing])
            self._scales[key] = search_channel_scales(rows, inputs, self._scheme(rows))
        return self._scales[key]


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """[windows, tokens, columns] → [tokens, columns]."""
    return tensor.reshape(-1, tensor.shape[-1])


def make_inputs(values: torch.Tensor, own: torch.Tensor | None, method: Method) -> Inputs:
    """Moments of weighted inputs, and their factor as the method has it."""
    with ExitStack() as changes:
        changes.enter_context(patch.object(gptq, "_DAMPINGS", (method.damping, *gptq._DAMPINGS)))
        if not method.by_moments:
            changes.enter_context(patch.object(gptq, "mean_squares", lambda inputs: torch.arange(inputs.shape[1])))
        corrects = own is not None and method.correction == "gptaq"
        factor = factorize(values, own=own if corrects else None, share=method.alpha)
        return Inputs(values, mean_squares(values), factor, own, method)


def scaled(inputs: Inputs, scales: torch.Tensor) -> Inputs:
    """Inputs of a matrix whose columns were multiplied by `scales`."""
    own = None if inputs.own is None else inputs.own / scales
    return make_inputs(inputs.values / scales, own, inputs.method)


def round_matrix(rows: torch.Tensor, inputs: Inputs, scheme: QuantScheme) -> Rows:
    """A matrix [out, in], quantized by the method and dequantized."""
    method = inputs.method
    if inputs.own is not None:
        rows = corrected(rows, inputs)
    wanted = rows.numpy()
    importance = inputs.squares
    if method.conditional:
        importance = torch.empty_like(importance)
        importance[inputs.factor.order] = inputs.variances()
    params = search_params(wanted, scheme, importance.clamp(min=0).numpy())
    params = round_scales(QuantParams(params.scales * np.float32(method.stretch), params.zero_points), scheme)
    if method.nearest:
        return dequantize(quantize(wanted, params, scheme), params, scheme)
    values = quantize_gptq(wanted, inputs.factor, params, scheme)
    for _ in range(method.researches):
        met = with_errors(rows, dequantize(values, params, scheme), inputs)
        params = search_params(met, scheme, importance.clamp(min=0).numpy())
        values = quantize_gptq(wanted, inputs.factor, params, scheme)
    hessian = inputs.hessian() if method.sweeps or method.refits else torch.empty(0)
    for _ in range(method.refits):
        params = fit_scales(rows, values, params, scheme, hessian)
        if method.requantize:
            values = quantize_gptq(wanted, inputs.factor, params, scheme)
            params = fit_scales(rows, values, params, scheme, hessian)
    for _ in range(method.sweeps):
        values = descend(rows, values, params, scheme, hessian)
    return dequantize(values, params, scheme)


def corrected(rows: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """The weights that, for the inputs as they come, give most of what the checkpoint's own inputs should have given.

    "gptaq" is the package's own. "qep" adds alpha W D H⁻¹, with H the Hessian and D the moments of (x' - x) xᵀ.
    """
    if inputs.factor.correction is not None:
        return correct(rows.clone(), inputs.factor)
    assert inputs.own is not None
    first = inputs.values[: len(inputs.own)]
    moments = (inputs.own - first).T @ first / len(first)
    return rows + inputs.method.alpha * torch.linalg.solve(inputs.hessian(), (rows @ moments).T).T


def with_errors(rows: torch.Tensor, restored: Rows, inputs: Inputs) -> Rows:
    """The weights with the errors of the columns before them added, as GPTQ rounded them."""
    order = inputs.factor.order
    errors = (rows - torch.from_numpy(restored))[:, order]
    met = torch.empty_like(rows)
    met[:, order] = rows[:, order] + errors @ inputs.triangle() - errors
    return met.numpy()


def fit_scales(
    rows: torch.Tensor, values: NDArray[np.uint8], params: QuantParams, scheme: QuantScheme, hessian: torch.Tensor
) -> QuantParams:
    """Scales that are best for these values in the Hessian's metric: for each row a system of its groups."""
    zeros = torch.from_numpy(params.zero_points)
    count, size = zeros.shape[1], scheme.group_size
    steps = torch.from_numpy(values.astype(np.float32)).view(len(rows), count, size) - zeros[..., None]
    system = torch.empty(len(rows), count, count)
    for group in range(count):
        seen = steps[:, group] @ hessian[group * size : (group + 1) * size]  # [rows, columns]
        system[:, group] = (seen.view(steps.shape) * steps).sum(dim=-1)
    wanted = ((rows @ hessian).view(steps.shape) * steps).sum(dim=-1)  # [rows, groups]
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.add_(torch.where(diagonal > 0, 1e-6 * diagonal, 1.0))
    found = torch.linalg.solve(system, wanted)
    scales = np.where(params.scales != 0, found.numpy(), 0).astype(np.float32)
    return round_scales(QuantParams(scales, params.zero_points), scheme)


def descend(
    rows: torch.Tensor, values: NDArray[np.uint8], params: QuantParams, scheme: QuantScheme, hessian: torch.Tensor
) -> NDArray[np.uint8]:
    """One sweep over the columns: each value takes the place that is best beside all others as they are."""
    scales = torch.from_numpy(params.scales).T.contiguous()  # [groups, rows]
    levels = torch.from_numpy(values.astype(np.float32)).T.contiguous()  # [columns, rows]
    error = torch.from_numpy(dequantize(values, params, scheme)).sub_(rows).T.contiguous()
    diagonal = hessian.diagonal()
    for start in range(0, len(levels), scheme.group_size):
        stop, group = start + scheme.group_size, start // scheme.group_size
        slope = hessian[start:stop] @ error  # [columns of the group, rows]
        near = hessian[start:stop, start:stop]
        inverse = torch.where(scales[group] == 0, 0.0, 1 / scales[group])
        for column in range(start, stop):
            change = slope[column - start] / -diagonal[column]
            level = (levels[column] + change * inverse).round_().clamp_(0, scheme.top)
            moved = (level - levels[column]) * scales[group]
            levels[column] = level
            error[column] += moved
            slope.addr_(near[:, column - start], moved)
    return levels.T.contiguous().numpy().astype(np.uint8)


def search_channel_scales(rows: torch.Tensor, inputs: Inputs, scheme: QuantScheme) -> torch.Tensor:
    """The power of the channels' mean magnitude [columns] with which rounding to nearest changes the outputs least."""
    hessian, magnitude = inputs.hessian(), inputs.values.abs().mean(dim=0).clamp(min=1e-8)
    best, least = torch.ones_like(magnitude), float("inf")
    for power in (0.0, 0.15, 0.3, 0.45, 0.6):
        scales = magnitude**power
        scales /= (scales.max() * scales.min()).sqrt()
        wanted = (rows * scales).numpy()
        params = search_params(wanted, scheme, (inputs.squares / scales.square()).numpy())
        error = torch.from_numpy(dequantize(quantize(wanted, params, scheme), params, scheme)) / scales - rows
        loss = ((error @ hessian) * error).sum().item()
        if loss < least:
            best, least = scales, loss
    return best


def normalized(squares: torch.Tensor) -> torch.Tensor:
    """Weights [windows, tokens] or [windows, tokens, heads] of mean 1."""
    return squares / squares.mean(dim=(0, 1)).clamp(min=torch.finfo(squares.dtype).tiny)


def first_token_out(sequence: SequenceState) -> torch.Tensor:
    """Weights without the first token of every window."""
    weights = torch.ones(sequence.hidden.shape[:2])
    weights[:, 0] = 0
    return normalized(weights)


def layer_weights(
    model: LayeredModel, layer: torch.nn.Module, sequence: SequenceState, head_dim: int | None
) -> dict[str, torch.Tensor]:
    """Squares of the gradient at each module's outputs of a random direction of the layer's output.

    A token's direction is as long as one over its state: the next norm divides by that.
    """
    draw = torch.Generator().manual_seed(0)
    hidden = sequence.hidden.clone().requires_grad_()
    with watch_gradients(layer, head_dim) as squares:
        out = model.call(layer, replace(sequence, hidden=hidden))
        size = out.detach().square().mean(dim=-1, keepdim=True).sqrt()
        torch.autograd.grad(out, hidden, torch.randn(out.shape, generator=draw) / size)
    return {name: normalized(found) for name, found in squares.items()}


def answer_weights(
    checkpoint: Checkpoint, windows: list[list[int]], head_dim: int | None, draws: int = 2
) -> dict[str, torch.Tensor]:
    """Squares of the gradient at each matrix's outputs of the log-probability of a drawn answer, over `draws`."""
    model = load_model(checkpoint, "float32")
    draw = torch.Generator().manual_seed(0)
    layers = model.get_submodule(checkpoint.family.layer_prefix.rstrip("."))
    sums: dict[str, list[torch.Tensor]] = {}
    for window in windows:
        found: dict[str, torch.Tensor] = {}
        with watch_gradients(layers, head_dim) as squares:
            hidden = model.get_input_embeddings()(torch.tensor([window])).detach().requires_grad_()
            logits = model(inputs_embeds=hidden, use_cache=False).logits[0]
            answers = logits.detach().softmax(-1)
            for number in range(draws):
                drawn = torch.multinomial(answers, 1, generator=draw)
                at_logits = answers.neg().scatter_add_(1, drawn, torch.ones(drawn.shape))
                torch.autograd.grad(logits, hidden, at_logits, retain_graph=number + 1 < draws)
                for name, tensor in squares.items():
                    found[name] = found.get(name, 0) + tensor
        for name, tensor in found.items():
            sums.setdefault(f"{checkpoint.family.layer_prefix}{name}.weight", []).append(tensor)
    return {name: normalized(torch.cat(tensors)) for name, tensors in sums.items()}


@contextmanager
def watch_gradients(module: torch.nn.Module, head_dim: int | None) -> Iterator[dict[str, torch.Tensor]]:
    """Yields a dict that gets the mean square over channels [windows, tokens] of the gradient at each linear output.

    Args:
        head_dim: queries, keys and values get one for each head [windows, tokens, heads].
    """
    squares: dict[str, torch.Tensor] = {}

    def see(name: str, output: torch.Tensor) -> None:
        def keep(gradient: torch.Tensor) -> None:
            if head_dim is not None and name.endswith(("q_proj", "k_proj", "v_proj")):
                gradient = gradient.unflatten(-1, (-1, head_dim))
            squares[name] = gradient.square().mean(dim=-1)

        output.register_hook(keep)

    hooks = [
        linear.register_forward_hook(lambda linear, given, output, name=name: see(name, output))
        for name, linear in linear_modules(module).items()
    ]
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()


def draw_windows(checkpoint: Checkpoint, tokens: int, seed: int) -> list[list[int]]:
    """Calibration windows of one seed."""
    draw = random.Random(seed)

    def encode(text: str) -> list[int]:
        ids = list(checkpoint.tokenizer(text)["input_ids"])
        start = draw.randrange(len(ids)) if seed else 0
        return ids[start:] + ids[:start]

    with patch.object(plan, "CALIBRATION_TOKENS", tokens):
        return plan.calibration_windows(encode, checkpoint.context_length or WINDOW_TOKENS)


def cached_answer_weights(
    checkpoint: Checkpoint, windows: list[list[int]], head_dim: int | None, kept: Path
) -> TokenWeights:
    """The same for every method with these windows."""
    if not kept.exists():
        torch.save(answer_weights(checkpoint, windows, head_dim), kept)
    weights: TokenWeights = torch.load(kept, weights_only=True)
    return weights


def report(lines: list[dict[str, Any]], beside: str) -> str:
    """A Markdown table: mean KL over seeds, and the ratio to a method's of the same seeds, lowest and highest."""
    runs = {(line["group_size"], line["method"], line["seed"]): line for line in lines}
    rows = []
    for group, method in dict.fromkeys((group, method) for group, method, _ in runs):
        seeds = sorted(seed for size, name, seed in runs if (size, name) == (group, method))
        paired = [seed for seed in seeds if (group, beside, seed) in runs]
        cells = []
        for language in runs[group, method, seeds[0]]["kl"]:
            found = [runs[group, method, seed]["kl"][language] for seed in seeds]
            ratios = [
                runs[group, method, seed]["kl"][language] / runs[group, beside, seed]["kl"][language] for seed in paired
            ]
            ratio = f" {statistics.mean(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})" if ratios else ""
            cells.append(f"{statistics.mean(found):.4f}:{ratio}")
        seconds = statistics.mean(runs[group, method, seed]["seconds"] for seed in seeds)
        rows.append(f"| {group} | {method} | {len(seeds)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", action="append", default=[], type=lambda pair: pair.split("=", 1))
    parser.add_argument("--cache", type=Path, help="keeps the checkpoint's logits and gradients between runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--group-size", action="append", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=Path, help="print a table of a finished file instead")
    parser.add_argument("--beside", default="gptq", choices=METHODS, help="method that a report compares with")
    arguments = parser.parse_args()
    if arguments.report:
        print(report([json.loads(line) for line in arguments.report.read_text().splitlines()], arguments.beside))
        return
    if not (arguments.model and arguments.text and arguments.cache and arguments.out):
        parser.error("MODEL, --text, --cache and --out are needed")
    torch.set_num_threads(arguments.threads)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, fast_matmul():
        located = locate(arguments.model, progress=NoProgress())
        checkpoint = open_checkpoint(located, Path(scratch), progress=NoProgress())
        texts = load_windows(checkpoint.folder, arguments.text, TEXT_WINDOWS)
        reference = load_reference(checkpoint, texts, arguments.cache)
        for group_size in arguments.group_size or [64]:
            for seed in arguments.seed or [0]:
                for name in arguments.method or METHODS:
                    if (name, seed, group_size) in finished(arguments.out):
                        continue
                    line = measure(checkpoint, name, seed, group_size, texts, reference, arguments.cache)
                    with arguments.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    print(json.dumps(line), flush=True)


def finished(out: Path) -> set[tuple[str, int, int]]:
    """Method, seed and group size of the runs in a file."""
    lines = map(json.loads, out.read_text().splitlines()) if out.exists() else iter(())
    return {(line["method"], line["seed"], line["group_size"]) for line in lines}


def measure(
    checkpoint: Checkpoint,
    name: str,
    seed: int,
    group_size: int,
    texts: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
    cache: Path,
) -> dict[str, Any]:
    """One run, as a line of the results."""
    method = METHODS[name]
    windows = draw_windows(checkpoint, method.tokens, seed)
    weights: TokenWeights = {}
    if method.weights == "answer":
        head_dim = checkpoint.architecture.head_dim if method.heads else None
        kept = cache / f"answer-{method.tokens}-{seed}-{head_dim}.pt"
        weights = cached_answer_weights(checkpoint, windows, head_dim, kept)
        weights = {matrix: normalized(tensor**method.exponent) for matrix, tensor in weights.items()}
    start = time.process_time()
    matrices = quantize_model(checkpoint, method, group_size, windows, weights)
    seconds = time.process_time() - start
    model = load_model(checkpoint, "float32")
    for matrix, values in matrices.items():
        set_parameter(model, matrix, values)
    quality = {language: compare(reference[language], predict_with(model), ids) for language, ids in texts.items()}
    return {
        "method": name,
        "seed": seed,
        "group_size": group_size,
        "tokens": sum(map(len, windows)),
        "seconds": round(seconds, 1),
        "kl": {language: figures["kl_mean"] for language, figures in quality.items()},
        "kl_median": {language: figures["kl_median"] for language, figures in quality.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
