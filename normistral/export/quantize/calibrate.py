"""Layer-by-layer quantization with calibration tokens.

The hidden states of all tokens pass through a layer once, together. In front of each linear module they wait until its
matrix is quantized for the inputs that have come, then go on through the quantized one. So each matrix is quantized for
the inputs that it will get, errors of earlier layers and of earlier matrices in its own layer included.

Memory: a matrix in float32, what flows through a layer, and one Hessian. reference/layerwise.py runs the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from normistral.errors import ExportError
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.quantize.gptq import HessianFactor, factorize, mean_squares, quantize_gptq
from normistral.export.quantize.kept_layers import KeptLayers
from normistral.export.quantize.plan import QuantPlan
from normistral.export.quantize.rtn import quantize
from normistral.export.quantize.scale_search import search_params
from normistral.export.quantize.scheme import QuantizedTensor, QuantScheme, unpack
from normistral.export.quantize.tensor_store import QuantizedTensorStore
from normistral.export.reference.layerwise import LayeredModel, clear_parameter, set_parameter
from normistral.hardware import read_machine
from normistral.progress import NoProgress, Stage

if TYPE_CHECKING:
    import torch
    from torch import nn

# With these the processor multiplies bfloat16 at twice the speed of float32, or more.
_FAST_BFLOAT16 = {"avx512_bf16", "amx_bf16"}


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
    sequences = model.embed_together(windows)
    if kept is not None:
        states = kept.load_states()
        if states is None:
            first = 0  # through the layers that are done, which quantize nothing again
        else:
            sequences.hidden = states
    for index in range(first, model.layers):
        quantizer = _LayerQuantizer(model, index, plan, quantized, in_int8, dtype)
        with (
            model.open_layer(index, without=quantizer.matrices) as layer,
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            quantizer.watch(layer),
        ):
            model.run(layer, sequences)
        if index < start:
            continue
        if kept is not None:
            kept.save(quantizer.stored_matrices, sequences.hidden if index + 1 < model.layers else None)
        stage.advance(1)


def calibration_dtype() -> str:
    """The type of the products on this machine: "bfloat16" or "float32"."""
    return "bfloat16" if read_machine().instruction_sets & _FAST_BFLOAT16 else "float32"


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
        dtype: in which quantized matrices are multiplied, and their errors fed back.
    """

    model: LayeredModel
    index: int
    plan: QuantPlan
    quantized: QuantizedTensorStore
    in_int8: Set[str]
    dtype: torch.dtype
    _waiting: set[str] = field(default_factory=set)
    _inputs: _Inputs | None = None

    @property
    def matrices(self) -> set[str]:
        """The parameters of the layer that this quantizes."""
        return {f"{name}.weight" for name in linear_modules(self.model.layer(self.index))}

    @property
    def stored_matrices(self) -> set[str]:
        """Names of these parameters in the checkpoint."""
        return {f"{self.model.prefix(self.index)}{name}" for name in self.matrices}

    @contextmanager
    def watch(self, layer: nn.Module) -> Iterator[None]:
        """Quantize what runs while the context is open."""
        modules = linear_modules(layer)
        self._waiting = set(modules)
        hooks = [
            hook
            for name, module in modules.items()
            for hook in (
                module.register_forward_pre_hook(lambda module, inputs, name=name: self._before(name, inputs[0])),
                module.register_forward_hook(lambda module, inputs, output, name=name: self._after(name)),
            )
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if self._waiting:
            raise ExportError(f"transformers does not use {self._stored(min(self._waiting))} once in its layer")

    def _stored(self, name: str) -> str:
        return f"{self.model.prefix(self.index)}{name}.weight"

    def _before(self, name: str, tensor: torch.Tensor) -> None:
        """Quantize a module's matrix for its inputs, and put it into the module as it will be when it runs."""
        import torch

        stored = self._stored(name)
        if name not in self._waiting:
            raise ExportError(f"transformers uses {stored} more than once in its layer")
        self._waiting.remove(name)
        with torch.autocast("cpu", enabled=False):
            if stored not in self.quantized.schemes:
                if self._inputs is None or self._inputs.tensor is not tensor:
                    self._inputs = None  # its factor goes before the next one comes
                    self._inputs = self._take(tensor)
                rows = self.model.read_matrix(stored).numpy()
                scheme = (self.plan.int8_scheme if stored in self.in_int8 else self.plan.scheme)(rows.shape[1])
                _quantize(stored, rows, self._inputs, scheme, self.quantized)
            restored = _restore(self.quantized.read(stored), self.quantized.schemes[stored])
            set_parameter(self.model.layer(self.index), f"{name}.weight", restored.to(self.dtype))

    def _take(self, tensor: torch.Tensor) -> _Inputs:
        flat = tensor.reshape(-1, tensor.shape[-1]).to(self.dtype)
        factor = factorize(flat, self.dtype) if self.plan.method == "gptq" else None
        return _Inputs(tensor, mean_squares(flat), factor)

    def _after(self, name: str) -> None:
        """Let go of a matrix that was used: a layer uses each one once."""
        clear_parameter(self.model.layer(self.index), f"{name}.weight")


def _quantize(
    name: str, rows: NDArray[np.float32], inputs: _Inputs, scheme: QuantScheme, quantized: QuantizedTensorStore
) -> None:
    """Quantize a matrix [out, in] into `quantized`."""
    params = search_params(rows, scheme, inputs.mean_squares.numpy())
    if inputs.factor is None:
        qweight = quantize(rows, params, scheme)
    else:
        qweight = quantize_gptq(rows, inputs.factor, params, scheme)
    quantized.write(name, qweight, params, scheme)


def _restore(matrix: QuantizedTensor, scheme: QuantScheme) -> torch.Tensor:
    """A quantized matrix [out, in] in float32."""
    import torch

    rows, groups = matrix.scales.shape
    qweight = unpack(matrix.qweight, scheme.bits)[:, : groups * scheme.group_size]
    values = torch.from_numpy(qweight.astype(np.float32)).view(rows, groups, scheme.group_size)
    if matrix.zero_points is None:
        values -= scheme.middle
    else:
        zero_points = unpack(matrix.zero_points, scheme.bits)[:, :groups]
        values -= torch.from_numpy(zero_points.astype(np.float32))[..., None]
    values *= torch.from_numpy(matrix.scales.copy())[..., None]
    return values.view(rows, -1)


def linear_modules(layer: nn.Module) -> dict[str, nn.Linear]:
    """The matrices of a layer that are rounded, by the names of their modules."""
    from torch import nn

    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


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
