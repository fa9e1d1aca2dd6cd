"""Changes an ONNX graph in memory at load: changes for this runtime alone, which the file does not get.

The runtime does without the package `onnx`. protobuf, which onnxruntime requires, reads the fields that are declared
here, and writes all others back as they were. Source of names and numbers: onnx.proto of the ONNX repository.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from normistral.errors import EXPORT_AGAIN, ArtifactError, first_line

LOGITS = "logits"
LOGITS_START = "logits_start"  # name of the input that `keep_last_logits` adds
LAST_POSITIONS = "last_positions"  # and of that of `take_lengths`

_MESSAGES = {  # of each message its fields: number and type; a * is "repeated"
    "ModelProto": {"graph": (7, "GraphProto"), "opset_import": (8, "OperatorSetIdProto*")},
    "OperatorSetIdProto": {"domain": (1, "string"), "version": (2, "int64")},
    "GraphProto": {
        "node": (1, "NodeProto*"),
        "initializer": (5, "TensorProto*"),
        "input": (11, "ValueInfoProto*"),
        "output": (12, "ValueInfoProto*"),
    },
    "NodeProto": {
        "input": (1, "string*"),
        "output": (2, "string*"),
        "name": (3, "string"),
        "op_type": (4, "string"),
        "attribute": (5, "AttributeProto*"),
    },
    "AttributeProto": {
        "name": (1, "string"),
        "i": (3, "int64"),
        "g": (6, "GraphProto"),
        "graphs": (11, "GraphProto*"),
        "type": (20, "int32"),
    },
    "TensorProto": {
        "dims": (1, "int64*"),
        "data_type": (2, "int32"),
        "name": (8, "string"),
        "raw_data": (9, "bytes"),
        "external_data": (13, "StringStringEntryProto*"),
    },
    "StringStringEntryProto": {"key": (1, "string"), "value": (2, "string")},
    "ValueInfoProto": {"name": (1, "string"), "type": (2, "TypeProto")},
    "TypeProto": {"tensor_type": (1, "Tensor")},
    "Tensor": {"elem_type": (1, "int32"), "shape": (2, "TensorShapeProto")},
    "TensorShapeProto": {"dim": (1, "Dimension*")},
    "Dimension": {"dim_value": (1, "int64")},
}
_INT32, _INT64 = 6, 7  # TensorProto.DataType
_DATA_TYPES = {"float32": 1, "int64": _INT64}  # of numpy's names
_INT = 2  # AttributeProto.AttributeType

# onnxruntime's ContribOperators.md: two operators, and inputs of the first
ATTENTION = "GroupQueryAttention"
QUANTIZED_PRODUCT = "MatMulNBits"
_PRODUCTS = ("MatMul", "Gemm", QUANTIZED_PRODUCT)
_PAST_INPUTS, _LENGTHS, _ATTENTION_BIAS = (3, 4), 5, 10
_PADDING = "mask.row"  # what hides padding in every attention's bias, as the exporter names it: [b, 1, 1, total]

Node: TypeAlias = Any
"""A NodeProto."""


@functools.cache
def _protobuf_classes() -> dict[str, Any]:
    """The messages as classes. Syntax proto3, where text is checked, with proto2's presence of fields (oneofs)."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="normistral/onnx.proto", package="normistral", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            added = message.field.add(name=field, number=number, label=kinds.LABEL_OPTIONAL)
            if kind.rstrip("*") in _MESSAGES:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".normistral.{kind.rstrip('*')}"
            else:
                added.type = kinds.Type.Value(f"TYPE_{kind.rstrip('*').upper()}")
            if kind.endswith("*"):
                added.label = kinds.LABEL_REPEATED
            else:
                added.proto3_optional, added.oneof_index = True, len(message.oneof_decl)
                message.oneof_decl.add(name=f"_{field}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    classes: dict[str, Any] = message_factory.GetMessageClassesForFiles([file.name], pool)
    return classes


def _damaged(what: str) -> ArtifactError:
    return ArtifactError(f"model.onnx is damaged: {what}", EXPORT_AGAIN)


def get_int(node: Node, name: str) -> int:
    """An integer attribute, 0 where it is not set."""
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), 0)


def _set_int(node: Node, name: str, value: int) -> None:
    """Set an integer attribute, new or not."""
    attribute = next((one for one in node.attribute if one.name == name), None) or node.attribute.add(name=name)
    attribute.i, attribute.type = value, _INT


def drop_empty_inputs(node: Node) -> None:
    """Leave out optional inputs at the end that are not given."""
    while node.input and not node.input[-1]:
        node.input.pop()


def make_node(operator: str, inputs: Iterable[str], output: str, **attributes: int) -> Node:
    """A new node of the ONNX standard, named after its output and operator: names are unique in a graph."""
    name = f"/{output}/{operator}"
    node = _protobuf_classes()["normistral.NodeProto"](input=inputs, output=[output], name=name, op_type=operator)
    for key, value in attributes.items():
        _set_int(node, key, value)
    return node


class OnnxGraph:
    """A ModelProto, open at its nodes."""

    def __init__(self, data: bytes) -> None:
        """Take a model.onnx apart.

        Raises:
            ArtifactError: the bytes are no ONNX model.
        """
        from google.protobuf.message import DecodeError

        try:
            self._model = _protobuf_classes()["normistral.ModelProto"].FromString(data)
        except DecodeError as exc:
            raise _damaged(first_line(exc)) from exc
        if not self._model.HasField("graph"):
            raise _damaged("it has no graph")
        self._graph = self._model.graph
        self.nodes: list[Node] = list(self._graph.node)
        self._constants: set[str] = set()  # those that were added

    def inputs(self) -> list[str]:
        """Names of the graph's inputs."""
        return [port.name for port in self._graph.input]

    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return [port.name for port in self._graph.output]

    def opset(self) -> int:
        """Version of the ONNX standard's operators; 0 where it is not said."""
        versions = [int(entry.version) for entry in self._model.opset_import if entry.domain in ("", "ai.onnx")]
        return versions[-1] if versions else 0

    def external_files(self) -> set[str]:
        """Names of the files that hold the weights, as the graph gives them."""
        entries = (entry for tensor in self._graph.initializer for entry in tensor.external_data)
        return {entry.value for entry in entries if entry.key == "location"}

    def add_vector_input(self, name: str, kind: int = _INT64, size: int | None = 1) -> None:
        """A new input [size] of a TensorProto.DataType; a size of None is any."""
        tensor = self._graph.input.add(name=name).type.tensor_type
        tensor.elem_type = kind
        tensor.shape.dim.add(dim_value=size)

    def add_constant(self, name: str, values: NDArray[Any]) -> str:
        """A constant, float32 or int64 of any shape, once for its name; returns the name."""
        if name not in self._constants:
            self._constants.add(name)
            raw = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
            kind = _DATA_TYPES[values.dtype.name]
            self._graph.initializer.add(dims=values.shape, data_type=kind, name=name, raw_data=raw)
        return name

    def add_node(self, before: Node, operator: str, inputs: Iterable[str], output: str, **attributes: int) -> str:
        """A new node, placed before another that reads it (nodes have to be in order); returns its output."""
        self.nodes.insert(self.place(before), make_node(operator, inputs, output, **attributes))
        return output

    def place(self, node: Node) -> int:
        """Index of this very node; others may be equal."""
        return next(index for index, one in enumerate(self.nodes) if one is node)

    def producer(self, name: str) -> Node | None:
        """The node that computes a tensor; None for inputs and constants."""
        return next((node for node in self.nodes if name in node.output), None)

    def __bytes__(self) -> bytes:
        model = type(self._model)()
        model.CopyFrom(self._model)
        del model.graph.node[:]
        model.graph.node.extend(self.nodes)
        data: bytes = model.SerializeToString()
        return data


def keep_last_logits(graph: OnnxGraph) -> None:
    """Compute the output layer from position `logits_start` on only, a new input [1]; -1 is the last position.

    The file computes logits of every position, as other loaders expect: for a prompt of 1,500 tokens that is a large
    product and 200 MB that are not read.

    Raises:
        ArtifactError: the logits do not come from a matrix product.
    """
    product = _walk_back(graph, LOGITS, ("Cast", "Add", "Reshape"))
    if product is None or product.op_type not in _PRODUCTS or not product.input:
        raise _damaged(f"the logits come from {product.op_type if product else 'no node'}, not from a matrix product")
    hidden = product.input[0]
    flattened = graph.producer(hidden)
    if product.op_type == "Gemm" and flattened is not None and flattened.op_type == "Reshape" and flattened.input:
        hidden = flattened.input[0]  # [1, n, hidden], which Gemm reads as [n, hidden]
    readers = [node for node in graph.nodes if hidden in node.input]
    graph.add_vector_input(LOGITS_START)
    end = graph.add_constant("logits_end", np.array([2**63 - 1]))
    axis = graph.add_constant("logits_axis", np.array([1]))
    last = graph.add_node(readers[0], "Slice", [hidden, LOGITS_START, end, axis], "last_hidden")
    for node in readers:
        node.input[:] = [last if name == hidden else name for name in node.input]


def _walk_back(graph: OnnxGraph, name: str, operators: Sequence[str]) -> Node | None:
    """The node that computes a tensor, seen through operators that only change what another node computed."""
    node = graph.producer(name)
    for _ in graph.nodes:  # as many steps as there are nodes, in case a damaged graph goes round
        if node is None or node.op_type not in operators or not node.input:
            break
        node = graph.producer(node.input[0])
    return node


def accuracy_levels(graph: OnnxGraph) -> list[int]:
    """The levels of the products of rounded weights, each once: 1 computes in float32, 4 rounds activations to int8."""
    return sorted({get_int(node, "accuracy_level") for node in graph.nodes if node.op_type == QUANTIZED_PRODUCT})


def set_accuracy_level(graph: OnnxGraph, level: int) -> None:
    """How the products of rounded weights are computed, by `accuracy_levels`."""
    for node in graph.nodes:
        if node.op_type == QUANTIZED_PRODUCT:
            _set_int(node, "accuracy_level", level)


def is_fused(graph: OnnxGraph) -> bool:
    """Whether attention is one operator that can keep past and present keys and values in one buffer."""
    return any(node.op_type == ATTENTION for node in graph.nodes)


def attend_in_place(graph: OnnxGraph) -> None:
    """Make every attention node read the past where it is bound, for a batch of one sequence.

    A Reshape between input and attention (it mends an empty past of another width) would be in the way of sharing one
    buffer. One sequence has no padding: what a bias says of padding is left out, and what else it says (ALiBi) stays.
    """
    inputs = set(graph.inputs())
    without_padding: dict[str, str] = {}  # a few hundred nodes, and all layers share one bias
    for node in graph.nodes:
        if node.op_type != ATTENTION:
            continue
        for index in _PAST_INPUTS:
            mend = graph.producer(node.input[index]) if index < len(node.input) else None
            if mend is not None and mend.op_type == "Reshape" and mend.input and mend.input[0] in inputs:
                node.input[index] = mend.input[0]
        if len(node.input) > _ATTENTION_BIAS:
            bias = node.input[_ATTENTION_BIAS]
            if bias not in without_padding:
                without_padding[bias] = _leave_out_padding(graph, bias)
            node.input[_ATTENTION_BIAS] = without_padding[bias]
        drop_empty_inputs(node)
    remove_unused(graph)


def take_lengths(graph: OnnxGraph) -> bool:
    """Let each sequence of a batch have a length of its own: input `last_positions`, int32 [batch].

    It holds the place of each row's last new token; the mask's width stays that of the longest. For a graph after
    `attend_in_place`. Returns whether that can be: not where a bias of the attention (ALiBi) counts from the end of the
    longest row.
    """
    attentions = [node for node in graph.nodes if node.op_type == ATTENTION]
    if not attentions or any(len(node.input) > _ATTENTION_BIAS for node in attentions):
        return False
    graph.add_vector_input(LAST_POSITIONS, _INT32, None)
    for node in attentions:
        node.input[_LENGTHS] = LAST_POSITIONS
    remove_unused(graph)
    return True


def _leave_out_padding(graph: OnnxGraph, bias: str) -> str:
    """The part of a bias that is not about padding; "" when nothing is left."""
    source = graph.producer(bias)
    if source is None or _PADDING not in source.input:
        return bias
    if source.op_type == "Expand":
        return ""
    if source.op_type == "Add" and len(source.input) == 2:
        return next(str(name) for name in source.input if name != _PADDING)
    raise _damaged(f"an attention's bias comes from {source.op_type}")


def remove_unused(graph: OnnxGraph) -> None:
    """Drop the nodes whose results are not read; onnxruntime would compute them."""
    attributes = (attribute for node in graph.nodes for attribute in node.attribute)
    if any(attribute.HasField("g") or attribute.graphs for attribute in attributes):
        return  # a subgraph (If, Loop, Scan) may use any name of the graph around it
    used = set(graph.outputs())
    kept = []
    for node in reversed(graph.nodes):  # nodes are in order: readers of a result stand behind its node
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    graph.nodes[:] = reversed(kept)
