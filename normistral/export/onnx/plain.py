"""The plain graph: Optimum's own, of standard operators only, with its weights streamed into the data file.

For float32 and float16, for GPUs and providers that lack onnxruntime's fused operators, and as the reference that the
fused graph is compared with. Optimum traces a decoder without weights; its placeholders become operators, and each
matrix is read, transposed and written before the next one.

Every matrix product and every look-up becomes one node of the domain normistral.placeholder, which names its weights:

    Linear(x [..., in], weight, bias?) → [..., out]        Embedding(ids [...], weight) → [..., width]

A layer norm becomes the standard's LayerNormalization, because torch's would look at its weights' shape.
So the tracer neither needs the weights nor decides in which layout they are stored. Every parameter has one element;
all that is computed while tracing are the small activations of Optimum's dummy inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import onnx
import torch
from onnx import TensorProto
from torch import nn

from normistral.artifact.manifest import Architecture
from normistral.errors import ExportError, first_line
from normistral.export.checkpoint.families.base import OUTPUT_LAYER
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor import WeightReader
from normistral.export.onnx.blocks import multiply_by_embedding, past_input
from normistral.export.onnx.graph import ExternalData, Graph
from normistral.export.onnx.signature import DATA_NAME, read_signature
from normistral.export.reference.model import build_empty
from normistral.export.tools import export_config
from normistral.progress import Stage

_TYPES = {"float32": (torch.float32, TensorProto.FLOAT), "float16": (torch.float16, TensorProto.FLOAT16)}


def write_plain(checkpoint: Checkpoint, output: Path, dtype: Literal["float32", "float16"], stage: Stage) -> None:
    """Write model.onnx and model.onnx.data; the same checkpoint gives the same bytes.

    Inputs, outputs and dynamic axes are Optimum's (signature.py). With float16, so are keys, values and logits, and
    the arithmetic but for norms, rotary angles and softmax, which transformers and torch do in float32.

    Args:
        output: an existing folder.
        stage: advanced by the stored bytes of each tensor that was read.

    Raises:
        ExportError: the model cannot be traced.
        CheckpointError: the weights cannot be read.
    """
    from transformers import AutoConfig

    torch_type, float_type = _TYPES[dtype]
    transformers_config = AutoConfig.for_model(**checkpoint.config)
    traced = trace(transformers_config, torch_type, output)
    with ExternalData(output / DATA_NAME) as data:
        graph = Graph(WeightReader(checkpoint.tensors), data, stage, float_type)
        architecture = checkpoint.architecture
        fill(graph, traced, architecture, checkpoint.family.embedding, checkpoint.tensor_shapes.keys())
        graph.save(output, read_signature(transformers_config, architecture, float_type))


def fill(graph: Graph, traced: onnx.GraphProto, architecture: Architecture, embedding: str, weights: Set[str]) -> None:
    """Add a traced graph, with operators for its placeholders and the checkpoint's weights.

    Args:
        embedding: name of its matrix.
        weights: names of the checkpoint's tensors.
    """
    past_inputs = {
        value.name: past_input(graph, value.name, architecture)
        for value in traced.input
        if value.name.startswith("past_key_values.")
    }
    for node in traced.node:
        node.input[:] = [past_inputs.get(name, name) for name in node.input]
        if node.domain != DOMAIN:
            for name in node.input:
                if name in weights:
                    graph.vector(name)
            graph.nodes.append(node)
        elif node.op_type == "Embedding":
            ids, weight = node.input
            graph.node("Gather", [graph.matrix(weight, [weight], transposed=False), ids], node.output)
        elif node.input[1] == OUTPUT_LAYER and architecture.tied_embeddings:
            multiply_by_embedding(graph, node.input[0], embedding, architecture, node.output[0])
        else:
            multiply(graph, node)
    written = {tensor.name for tensor in graph.initializers}
    missing = {name for node in graph.nodes for name in node.input} - written
    graph.initializers += [tensor for tensor in traced.initializer if tensor.name in missing]  # folded constants


def multiply(graph: Graph, node: onnx.NodeProto) -> None:
    """x [b, s, in] times a matrix, which is stored as [in, out], plus its bias if it has one: [b, s, out]."""
    x, weight, *bias = node.input
    matrix = graph.matrix(weight, [weight], transposed=True)
    if not bias:
        graph.node("MatMul", [x, matrix], node.output)
        return
    product = graph.node("MatMul", [x, matrix], [f"{node.output[0]}.product"])
    graph.node("Add", [product, graph.vector(bias[0])], node.output)


DOMAIN = "normistral.placeholder"

_OPEN = (None, None)  # batch and tokens: sizes that were left as traced would become constants of the graph


class _Product(torch.autograd.Function):
    """nn.Linear as a placeholder node Linear."""

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, width: int
    ) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], width)

    @staticmethod
    def symbolic(graph: Any, x: Any, weight: Any, bias: Any | None, width: int) -> Any:
        # torch's exporter masks attention scores with a float32 constant, and all that follows is float32. Softmax and
        # the product with the values gain by it; before the projection it has to end.
        if weight.type().scalarType() == "Half" and x.type().scalarType() != "Half":
            x = graph.op("Cast", x, to_i=onnx.TensorProto.FLOAT16)
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return graph.op(f"{DOMAIN}::Linear", *inputs).setType(weight.type().with_sizes([*_OPEN, width]))


class _LookUp(torch.autograd.Function):
    """nn.Embedding as a placeholder node Embedding."""

    @staticmethod
    def forward(context: Any, ids: torch.Tensor, weight: torch.Tensor, width: int) -> torch.Tensor:
        return weight.new_zeros(*ids.shape, width)

    @staticmethod
    def symbolic(graph: Any, ids: Any, weight: Any, width: int) -> Any:
        return graph.op(f"{DOMAIN}::Embedding", ids, weight).setType(weight.type().with_sizes([*_OPEN, width]))


class _Normalisation(torch.autograd.Function):
    """nn.LayerNorm as the standard's node."""

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def symbolic(graph: Any, x: Any, weight: Any, bias: Any, epsilon: float) -> Any:
        return graph.op("LayerNormalization", x, weight, bias, axis_i=-1, epsilon_f=epsilon).setType(x.type())


# A module's forward, called with the module and its input.
_FORWARDS: dict[type[nn.Module], Callable[[Any, torch.Tensor], Any]] = {
    nn.Linear: lambda layer, x: _Product.apply(x, layer.weight, layer.bias, layer.out_features),  # type: ignore[no-untyped-call]
    nn.Embedding: lambda layer, ids: _LookUp.apply(ids, layer.weight, layer.embedding_dim),  # type: ignore[no-untyped-call]
    nn.LayerNorm: lambda layer, x: _Normalisation.apply(x, layer.weight, layer.bias, layer.eps),  # type: ignore[no-untyped-call]
}


def build_decoder(config: Any, dtype: torch.dtype) -> nn.Module:
    """The transformers model of a configuration, with one element for every parameter.

    Args:
        config: the transformers configuration.
    """
    model: nn.Module = build_empty(config, dtype)  # buffers are the rotary frequencies, which are wanted
    for module in model.modules():
        for kind, forward in _FORWARDS.items():
            if isinstance(module, kind):
                module.forward = partial(forward, module)
    _shrink_parameters(model, dtype)
    return model.eval()


def _shrink_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """One element each, no two alike: the exporter makes one initializer of equal ones."""
    # A tied output layer is a module with a parameter of its own here: which bytes it reads is the writer's business.
    owners = [(module, name) for module in model.modules() for name, _ in module.named_parameters(recurse=False)]
    bits = torch.int16 if dtype == torch.float16 else torch.int32  # of integers, float16 tells only 2048 apart
    values = torch.arange(1, len(owners) + 1, dtype=bits).view(dtype)
    for index, (module, name) in enumerate(owners):
        setattr(module, name, nn.Parameter(values[index : index + 1].clone(), requires_grad=False))


def trace(config: Any, dtype: torch.dtype, folder: Path) -> onnx.GraphProto:
    """The graph of a decoder as Optimum exports it, with placeholders for weights, products and look-ups.

    Initializers that stand for weights are named as in the checkpoint ("model.layers.0.self_attn.q_proj.weight").

    Args:
        config: the transformers configuration.
        folder: where the exporter may put a file of a few megabytes; it is gone afterwards.

    Raises:
        ExportError: transformers, torch or Optimum cannot.
    """
    from optimum.exporters.onnx.convert import export_pytorch

    optimum = export_config("onnx", config)
    optimum.float_dtype = "fp16" if dtype == torch.float16 else "fp32"
    try:
        with TemporaryDirectory(prefix="trace-", dir=folder) as scratch:
            file = Path(scratch) / "traced.onnx"
            export_pytorch(build_decoder(config, dtype), optimum, optimum.DEFAULT_ONNX_OPSET, file)
            return onnx.load(file).graph
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as exc:
        raise ExportError(f"the model cannot be converted to ONNX: {first_line(exc)}") from exc
