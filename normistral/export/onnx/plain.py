"""The plain graph: Optimum's own, of standard operators only, with its weights streamed into the data file.

For float32 and float16, for GPUs and providers that lack onnxruntime's fused operators, and as the reference that the
fused graph is compared with. Optimum traces a decoder without weights (placeholders.py); here its placeholders become
operators, and each matrix is read, transposed and written before the next one.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Literal

import onnx
import torch
from onnx import TensorProto

from normistral.artifact.manifest import Architecture
from normistral.export.checkpoint.families.base import OUTPUT_LAYER
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor_reader import WeightReader
from normistral.export.onnx import placeholders
from normistral.export.onnx.blocks import multiply_by_embedding, past_input
from normistral.export.onnx.graph import ExternalData, Graph
from normistral.export.onnx.signature import DATA_NAME, read_signature
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
    traced = placeholders.trace(transformers_config, torch_type, output)
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
        if node.domain != placeholders.DOMAIN:
            for name in node.input:
                if name in weights:
                    graph.vector(name)
            graph.nodes.append(node)
        elif node.op_type == "Embedding":
            look_up(graph, node)
        elif node.input[1] == OUTPUT_LAYER and architecture.tied_embeddings:
            multiply_by_embedding(graph, node.input[0], embedding, architecture, node.output[0])
        else:
            multiply(graph, node)
    written = {tensor.name for tensor in graph.initializers}
    missing = {name for node in graph.nodes for name in node.input} - written
    graph.initializers += [tensor for tensor in traced.initializer if tensor.name in missing]  # folded constants


def look_up(graph: Graph, node: onnx.NodeProto) -> None:
    """Rows of the embedding: ids [b, s] → [b, s, hidden]."""
    ids, weight = node.input
    graph.node("Gather", [graph.matrix(weight, [weight], transposed=False), ids], node.output)


def multiply(graph: Graph, node: onnx.NodeProto) -> None:
    """x [b, s, in] times a matrix, which is stored as [in, out], plus its bias if it has one: [b, s, out]."""
    x, weight, *bias = node.input
    matrix = graph.matrix(weight, [weight], transposed=True)
    if not bias:
        graph.node("MatMul", [x, matrix], node.output)
        return
    product = graph.node("MatMul", [x, matrix], [f"{node.output[0]}.product"])
    graph.node("Add", [product, graph.vector(bias[0])], node.output)
