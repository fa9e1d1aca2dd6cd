"""Layer-by-layer quantization with calibration tokens.

The hidden states of all tokens pass through a layer once, together. In front of each linear module they wait until its
matrix is quantized for the inputs that have come, then go on through the quantized one. So each matrix is quantized for
the inputs that it will get, errors of earlier layers and of earlier matrices in its own layer included.

With a correction (`QuantPlan.correction`) the checkpoint's own states pass through each layer first, with its own
matrices; the difference of their inputs is what the quantized matrices partly take over.

Memory: a matrix in float32, what flows through a layer, and one Hessian; with a correction, the inputs that a layer's
own matrices had, too. reference/layerwise.py runs the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from normistral.errors import ExportError
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.quantize.gptq import HessianFactor, correct, factorize, mean_squares, quantize_gptq
from normistral.export.quantize.kept_layers import KeptLayers
from normistral.export.quantize.plan import QuantPlan
from normistral.export.quantize.rtn import quantize
from normistral.export.quantize.scale_search import search_params
from normistral.export.quantize.scheme import QuantizedTensor, QuantParams, QuantScheme, dequantize, unpack
from normistral.export.quantize.tensor_store import QuantizedTensorStore
from normistral.export.reference.layerwise import LayeredModel, SequenceState, clear_parameter, set_parameter
from normistral.hardware import read_machine
from normistral.progress import NoProgress, Stage

if TYPE_CHECKING:
    import torch
    from torch import nn

# With these the processor multiplies bfloat16 at twice the speed of float32, or more.
_FAST_BFLOAT16 = {"avx512_bf16", "amx_bf16"}
# Inputs of at least so many times the hidden size, those of the feed-forward's last matrix, are not corrected: at the
# 7B's widths their products and solutions would take 7 times as long as those of all others.
_LEAST_UNCORRECTED = 2


def quantize_layers(
    checkpoint: Checkpoint,
    plan: QuantPlan,
    windows: list[list[int]],
    quantized: QuantizedTensorStore,
    stage: Stage,
    in_int8: Set[str] = frozenset(),
    kept: KeptLayers | None = None,
) -> None:
    """Quantize every matrix inside the decoder's layers; embedding and output layer are left.

    Args:
        windows: the calibration's token ids, in pieces of one length.
        in_int8: names of the matrices that take `plan.int8_scheme`.
        quantized: receives the matrices; `kept.tensors` if there is one.
        stage: advanced by the number of layers done.
        kept: the first layers, which are done; receives each of the others.

    Raises:
        ExportError: transformers cannot build the model, or it computes values that are no numbers.
        CheckpointError: the weights cannot be read.
        OSError: a matrix or a layer cannot be written.
    """
    import torch

    dtype = getattr(torch, calibration_dtype())
    model = LayeredModel(checkpoint, NoProgress())
    start = first = 0 if kept is None else kept.done
    if start == model.layers:
        return
    (quantized_states,) = model.embed(windows)
    own_states = replace(quantized_states)
    states = [quantized_states, own_states] if plan.correction else [quantized_states]
    if kept is not None:
        saved = kept.load_states()
        if saved is None:
            first = 0  # through the layers that are done, which quantize nothing again
        else:
            parts = torch.split(saved, [len(each.hidden) for each in states])
            for each, part in zip(states, parts, strict=True):
                each.hidden = part
    for index in range(first, model.layers):
        own_inputs = _record_inputs(model, index, own_states, dtype) if plan.correction else {}
        quantizer = _LayerQuantizer(model, index, plan, quantized, in_int8, dtype, own_inputs)
        _run_layer(model, index, quantized_states, dtype, quantizer.quantize)
        del quantizer  # and its last factor, 1.3 GB at the 7B's widths, before the next layer runs
        if index < start:
            continue
        if kept is not None:
            names = [_stored(model, index, name) for name in linear_modules(model.layer(index))]
            kept.save(names, torch.cat([each.hidden for each in states]) if index + 1 < model.layers else None)
        stage.advance(1)


def calibration_dtype() -> str:
    """The type of the products on this machine: "bfloat16" or "float32"."""
    return "bfloat16" if read_machine().instruction_sets & _FAST_BFLOAT16 else "float32"


def _run_layer(
    model: LayeredModel,
    index: int,
    sequence: SequenceState,
    dtype: torch.dtype,
    matrix: Callable[[str, torch.Tensor], torch.Tensor],
) -> None:
    """Pass a sequence through layer `index`, whose linear modules get their matrices one after the other.

    Args:
        dtype: in which these matrices are multiplied.
        matrix: from a module's name and its inputs [windows, tokens, columns], when they come, to its matrix.

    Raises:
        ExportError: transformers does not use each matrix once in its layer.
    """
    import torch

    modules = linear_modules(model.layer(index))
    waiting = set(modules)

    def before(name: str, inputs: torch.Tensor) -> None:
        if name not in waiting:
            raise ExportError(f"transformers uses {_stored(model, index, name)} more than once in its layer")
        waiting.remove(name)
        with torch.autocast("cpu", enabled=False):
            set_parameter(model.layer(index), f"{name}.weight", matrix(name, inputs).to(dtype))

    def after(name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        clear_parameter(model.layer(index), f"{name}.weight")

    with (
        hooked_modules(model.layer(index), before, after),
        model.open_layer(index, without={f"{name}.weight" for name in modules}) as layer,
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        model.run(layer, sequence)
    if waiting:
        raise ExportError(f"transformers does not use {_stored(model, index, min(waiting))} once in its layer")


def _record_inputs(
    model: LayeredModel, index: int, sequence: SequenceState, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Pass the checkpoint's own states through its own layer; inputs of the modules whose matrices are corrected.

    Returns:
        [tokens, columns] in `dtype`, by the first module that has these inputs.
    """
    found: dict[str, torch.Tensor] = {}
    last: torch.Tensor | None = None

    def matrix(name: str, inputs: torch.Tensor) -> torch.Tensor:
        nonlocal last
        if inputs is not last and inputs.shape[-1] < _LEAST_UNCORRECTED * sequence.hidden.shape[-1]:
            found[name] = _flat(inputs, dtype)
        last = inputs
        return model.read_matrix(_stored(model, index, name))

    _run_layer(model, index, sequence, dtype, matrix)
    return found


@dataclass(slots=True)
class _Inputs:
    """What one tensor of inputs gives to all matrices that it is multiplied with (queries, keys and values)."""

    tensor: torch.Tensor
    mean_squares: torch.Tensor
    factor: HessianFactor | None


@dataclass(slots=True)
class _LayerQuantizer:
    """Quantizes the linear modules of layer `index`, each when its inputs come; one that is quantized already is used.

    Attributes:
        dtype: in which their errors are fed back.
        own_inputs: of the checkpoint's own layer, for the correction: `_record_inputs`. Each goes when it was used.
    """

    model: LayeredModel
    index: int
    plan: QuantPlan
    quantized: QuantizedTensorStore
    in_int8: Set[str]
    dtype: torch.dtype
    own_inputs: dict[str, torch.Tensor]
    _inputs: _Inputs | None = None

    def quantize(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Quantize a module's matrix for its inputs [windows, tokens, columns]. Returns it as it will be: float32."""
        stored = _stored(self.model, self.index, name)
        if stored not in self.quantized.schemes:
            if self._inputs is None or self._inputs.tensor is not tensor:
                self._inputs = None  # its factor goes before the next one comes
                self._inputs = self._take(name, tensor)
            rows = self.model.read_matrix(stored)
            scheme = (self.plan.int8_scheme if stored in self.in_int8 else self.plan.scheme)(rows.shape[1])
            _quantize(stored, rows, self._inputs, scheme, self.quantized)
        return _restore(self.quantized.read(stored), self.quantized.schemes[stored])

    def _take(self, name: str, tensor: torch.Tensor) -> _Inputs:
        flat, own = _flat(tensor, self.dtype), self.own_inputs.pop(name, None)
        factor = None
        if self.plan.method == "gptq":
            factor = factorize(flat, self.dtype, own, self.plan.correction)
        return _Inputs(tensor, mean_squares(flat), factor)


def _flat(inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[windows, tokens, columns] → [tokens, columns]."""
    return inputs.reshape(-1, inputs.shape[-1]).to(dtype)


def _stored(model: LayeredModel, index: int, name: str) -> str:
    """The checkpoint's name of a module's matrix."""
    return f"{model.prefix(index)}{name}.weight"


def _quantize(
    name: str, matrix: torch.Tensor, inputs: _Inputs, scheme: QuantScheme, quantized: QuantizedTensorStore
) -> None:
    factor = inputs.factor
    rows = (matrix if factor is None else correct(matrix, factor)).numpy()
    params = search_params(rows, scheme, inputs.mean_squares.numpy())
    qweight = quantize(rows, params, scheme) if factor is None else quantize_gptq(rows, factor, params, scheme)
    quantized.write(name, qweight, params, scheme)


def _restore(matrix: QuantizedTensor, scheme: QuantScheme) -> torch.Tensor:
    """A quantized matrix [out, in] in float32."""
    import torch

    groups = matrix.scales.shape[1]
    qweight = unpack(matrix.qweight, scheme.bits)[:, : groups * scheme.group_size]
    if matrix.zero_points is None:
        zeros = np.full(matrix.scales.shape, scheme.middle, np.float32)
    else:
        zeros = unpack(matrix.zero_points, scheme.bits)[:, :groups].astype(np.float32)
    return torch.from_numpy(dequantize(qweight, QuantParams(matrix.scales, zeros), scheme))


def linear_modules(layer: nn.Module) -> dict[str, nn.Linear]:
    """The matrices of a layer that are rounded, by the names of their modules."""
    from torch import nn

    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


@contextmanager
def hooked_modules(
    layer: nn.Module,
    before: Callable[[str, torch.Tensor], None] = lambda name, inputs: None,
    after: Callable[[str, torch.Tensor, torch.Tensor], None] = lambda name, inputs, output: None,
) -> Iterator[None]:
    """Have a layer call these with the name, inputs and output of each linear module while the context is open."""
    with ExitStack() as hooks:
        for name, module in linear_modules(layer).items():
            for hook in (
                module.register_forward_pre_hook(lambda module, inputs, name=name: before(name, inputs[0])),
                module.register_forward_hook(lambda module, inputs, output, name=name: after(name, inputs[0], output)),
            ):
                hooks.callback(hook.remove)
        yield


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
