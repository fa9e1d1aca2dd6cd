"""Changes an ONNX graph in memory at load: changes for this runtime alone, which the file does not get.

The runtime does without the package `onnx`: of a model it reads nodes, and the names of weights. Source of the field
numbers: onnx.proto of the ONNX repository.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normistral.errors import EXPORT_AGAIN, ArtifactError
from normistral.runtime.engines.protobuf import WireError, WireMessage

LOGITS = "logits"
LOGITS_START = "logits_start"  # name of the input that `keep_last_logits` adds
LAST_POSITIONS = "last_positions"  # and of that of `take_lengths`

# onnx.proto
_MODEL_GRAPH, _MODEL_OPSET_IMPORT = 7, 8
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_I, _ATTRIBUTE_G, _ATTRIBUTE_TYPE, _ATTRIBUTE_GRAPHS = 1, 3, 6, 20, 11
_TENSOR_DIMS, _TENSOR_DATA_TYPE, _TENSOR_NAME, _TENSOR_RAW_DATA, _TENSOR_EXTERNAL_DATA = 1, 2, 8, 9, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VALUE_INFO_NAME, _VALUE_INFO_TYPE = 1, 2
_TYPE_TENSOR, _TYPE_TENSOR_ELEM_TYPE, _TYPE_TENSOR_SHAPE = 1, 1, 2
_SHAPE_DIM, _DIM_VALUE = 1, 1
_INT32, _INT64 = 6, 7  # TensorProto.DataType
_DATA_TYPES = {"float32": 1, "int64": _INT64}  # of numpy's names
_INT = 2  # AttributeProto.AttributeType

# onnxruntime's ContribOperators.md: two operators, and inputs of the first
ATTENTION = "GroupQueryAttention"
QUANTIZED_PRODUCT = "MatMulNBits"
_PRODUCTS = ("MatMul", "Gemm", QUANTIZED_PRODUCT)
_PAST_INPUTS, _LENGTHS, _ATTENTION_BIAS = (3, 4), 5, 10
_PADDING = "mask.row"  # what hides padding in every attention's bias, as the exporter names it: [b, 1, 1, total]


@contextmanager
def _readable() -> Iterator[None]:
    """Translate what the wire format says of bytes that are no ONNX model."""
    try:
        yield
    except WireError as exc:
        raise _damaged(str(exc)) from exc


def _damaged(what: str) -> ArtifactError:
    return ArtifactError(f"model.onnx is damaged: {what}", EXPORT_AGAIN)


class Node:
    """A NodeProto: its inputs, outputs and operator; everything else stays as it was."""

    def __init__(self, message: WireMessage) -> None:
        self.inputs = message.texts(_NODE_INPUT)
        self.outputs = message.texts(_NODE_OUTPUT)
        self.operator = message.text(_NODE_OP_TYPE)
        message.remove(_NODE_INPUT, _NODE_OUTPUT)
        self._rest = message

    def get_int(self, name: str) -> int:
        """An integer attribute, 0 where it is not set."""
        attributes = [WireMessage(chunk) for chunk in self._rest.chunks(_NODE_ATTRIBUTE)]
        found = [attribute for attribute in attributes if attribute.text(_ATTRIBUTE_NAME) == name]
        return found[0].number(_ATTRIBUTE_I) if found else 0

    def set_int(self, name: str, value: int) -> None:
        """Set an integer attribute, new or not."""
        kept = [
            chunk for chunk in self._rest.chunks(_NODE_ATTRIBUTE) if WireMessage(chunk).text(_ATTRIBUTE_NAME) != name
        ]
        self._rest.remove(_NODE_ATTRIBUTE)
        for chunk in kept:
            self._rest.add(_NODE_ATTRIBUTE, bytes(chunk))
        attribute = WireMessage().add(_ATTRIBUTE_NAME, name).add(_ATTRIBUTE_I, value).add(_ATTRIBUTE_TYPE, _INT)
        self._rest.add(_NODE_ATTRIBUTE, attribute)

    def has_subgraph(self) -> bool:
        """Whether an attribute is a graph (If, Loop, Scan), which may use any name of the graph around it."""
        attributes = [WireMessage(chunk) for chunk in self._rest.chunks(_NODE_ATTRIBUTE)]
        return any(attribute.chunks(_ATTRIBUTE_G) or attribute.chunks(_ATTRIBUTE_GRAPHS) for attribute in attributes)

    def message(self) -> WireMessage:
        """As it is written."""
        message = WireMessage()
        for name in self.inputs:
            message.add(_NODE_INPUT, name)
        for name in self.outputs:
            message.add(_NODE_OUTPUT, name)
        message.fields += self._rest.fields
        return message


def make_node(operator: str, inputs: Iterable[str], output: str, **attributes: int) -> Node:
    """A new node of the ONNX standard, named after its output and operator: names are unique in a graph."""
    node = Node(WireMessage().add(_NODE_OP_TYPE, operator).add(_NODE_NAME, f"/{output}/{operator}"))
    node.inputs, node.outputs = list(inputs), [output]
    for name, value in attributes.items():
        node.set_int(name, value)
    return node


class OnnxGraph:
    """A ModelProto, open at its nodes."""

    def __init__(self, data: bytes) -> None:
        """Take a model.onnx apart.

        Raises:
            ArtifactError: the bytes are no ONNX model.
        """
        self._model, self._graph, self.nodes = _take_apart(data)
        self._constants: set[str] = set()  # those that were added

    def inputs(self) -> list[str]:
        """Names of the graph's inputs."""
        return self._names(_GRAPH_INPUT)

    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return self._names(_GRAPH_OUTPUT)

    @_readable()
    def opset(self) -> int:
        """Version of the ONNX standard's operators; 0 where it is not said."""
        imports = [WireMessage(chunk) for chunk in self._model.chunks(_MODEL_OPSET_IMPORT)]
        standard = [entry for entry in imports if entry.text(_OPSET_DOMAIN) in ("", "ai.onnx")]
        return standard[-1].number(_OPSET_VERSION) if standard else 0

    @_readable()
    def external_files(self) -> set[str]:
        """Names of the files that hold the weights, as the graph gives them."""
        entries = [
            WireMessage(entry)
            for tensor in self._graph.chunks(_GRAPH_INITIALIZER)
            for entry in WireMessage(tensor).chunks(_TENSOR_EXTERNAL_DATA)
        ]
        return {entry.text(_ENTRY_VALUE) for entry in entries if entry.text(_ENTRY_KEY) == "location"}

    def add_vector_input(self, name: str, kind: int = _INT64, size: int | None = 1) -> None:
        """A new input [size] of a TensorProto.DataType; a size of None is any."""
        dimension = WireMessage() if size is None else WireMessage().add(_DIM_VALUE, size)
        shape = WireMessage().add(_SHAPE_DIM, dimension)
        tensor = WireMessage().add(_TYPE_TENSOR_ELEM_TYPE, kind).add(_TYPE_TENSOR_SHAPE, shape)
        value_info = (
            WireMessage().add(_VALUE_INFO_NAME, name).add(_VALUE_INFO_TYPE, WireMessage().add(_TYPE_TENSOR, tensor))
        )
        self._graph.add(_GRAPH_INPUT, value_info)

    def add_constant(self, name: str, values: NDArray[Any]) -> str:
        """A constant, float32 or int64 of any shape, once for its name; returns the name."""
        if name in self._constants:
            return name
        self._constants.add(name)
        tensor = WireMessage()
        for length in values.shape:
            tensor.add(_TENSOR_DIMS, length)
        tensor.add(_TENSOR_DATA_TYPE, _DATA_TYPES[values.dtype.name]).add(_TENSOR_NAME, name)
        little_endian = values.astype(values.dtype.newbyteorder("<"), copy=False)
        self._graph.add(_GRAPH_INITIALIZER, tensor.add(_TENSOR_RAW_DATA, little_endian.tobytes()))
        return name

    def add_node(self, before: Node, operator: str, inputs: Iterable[str], output: str, **attributes: int) -> str:
        """A new node, placed before another that reads it (nodes have to be in order); returns its output."""
        self.nodes.insert(self.nodes.index(before), make_node(operator, inputs, output, **attributes))
        return output

    def producer(self, name: str) -> Node | None:
        """The node that computes a tensor; None for inputs and constants."""
        return next((node for node in self.nodes if name in node.outputs), None)

    def __bytes__(self) -> bytes:
        graph, model = WireMessage(), WireMessage()
        for node in self.nodes:
            graph.add(_GRAPH_NODE, node.message())
        graph.fields += self._graph.fields
        model.fields = list(self._model.fields)
        return bytes(model.add(_MODEL_GRAPH, graph))

    @_readable()
    def _names(self, field: int) -> list[str]:
        return [WireMessage(chunk).text(_VALUE_INFO_NAME) for chunk in self._graph.chunks(field)]


def keep_last_logits(graph: OnnxGraph) -> None:
    """Compute the output layer from position `logits_start` on only, a new input [1]; -1 is the last position.

    The file computes logits of every position, as other loaders expect: for a prompt of 1,500 tokens that is a large
    product and 200 MB that are not read.

    Raises:
        ArtifactError: the logits do not come from a matrix product.
    """
    product = _walk_back(graph, LOGITS, ("Cast", "Add", "Reshape"))
    if product is None or product.operator not in _PRODUCTS or not product.inputs:
        raise _damaged(f"the logits come from {product.operator if product else 'no node'}, not from a matrix product")
    hidden = product.inputs[0]
    flattened = graph.producer(hidden)
    if product.operator == "Gemm" and flattened is not None and flattened.operator == "Reshape" and flattened.inputs:
        hidden = flattened.inputs[0]  # [1, n, hidden], which Gemm reads as [n, hidden]
    readers = [node for node in graph.nodes if hidden in node.inputs]
    graph.add_vector_input(LOGITS_START)
    end = graph.add_constant("logits_end", np.array([2**63 - 1]))
    axis = graph.add_constant("logits_axis", np.array([1]))
    last = graph.add_node(readers[0], "Slice", [hidden, LOGITS_START, end, axis], "last_hidden")
    for node in readers:
        node.inputs = [last if name == hidden else name for name in node.inputs]


def _walk_back(graph: OnnxGraph, name: str, operators: Sequence[str]) -> Node | None:
    """The node that computes a tensor, seen through operators that only change what another node computed."""
    node = graph.producer(name)
    for _ in graph.nodes:  # as many steps as there are nodes, in case a damaged graph goes round
        if node is None or node.operator not in operators or not node.inputs:
            break
        node = graph.producer(node.inputs[0])
    return node


@_readable()
def accuracy_levels(graph: OnnxGraph) -> list[int]:
    """The levels of the products of rounded weights, each once: 1 computes in float32, 4 rounds activations to int8."""
    return sorted({node.get_int("accuracy_level") for node in graph.nodes if node.operator == QUANTIZED_PRODUCT})


@_readable()
def set_accuracy_level(graph: OnnxGraph, level: int) -> None:
    """How the products of rounded weights are computed, by `accuracy_levels`."""
    for node in graph.nodes:
        if node.operator == QUANTIZED_PRODUCT:
            node.set_int("accuracy_level", level)


def is_fused(graph: OnnxGraph) -> bool:
    """Whether attention is one operator that can keep past and present keys and values in one buffer."""
    return any(node.operator == ATTENTION for node in graph.nodes)


def attend_in_place(graph: OnnxGraph) -> None:
    """Make every attention node read the past where it is bound, for a batch of one sequence.

    A Reshape between input and attention (it mends an empty past of another width) would be in the way of sharing one
    buffer. One sequence has no padding: what a bias says of padding is left out, and what else it says (ALiBi) stays.
    """
    inputs = set(graph.inputs())
    without_padding: dict[str, str] = {}  # a few hundred nodes, and all layers share one bias
    for node in graph.nodes:
        if node.operator != ATTENTION:
            continue
        for index in _PAST_INPUTS:
            mend = graph.producer(node.inputs[index]) if index < len(node.inputs) else None
            if mend is not None and mend.operator == "Reshape" and mend.inputs and mend.inputs[0] in inputs:
                node.inputs[index] = mend.inputs[0]
        if len(node.inputs) > _ATTENTION_BIAS:
            bias = node.inputs[_ATTENTION_BIAS]
            if bias not in without_padding:
                without_padding[bias] = _leave_out_padding(graph, bias)
            node.inputs[_ATTENTION_BIAS] = without_padding[bias]
        while node.inputs and not node.inputs[-1]:  # optional inputs at the end are left out
            node.inputs.pop()
    remove_unused(graph)


def take_lengths(graph: OnnxGraph) -> bool:
    """Let each sequence of a batch have a length of its own: input `last_positions`, int32 [batch].

    It holds the place of each row's last new token; the mask's width stays that of the longest. For a graph after
    `attend_in_place`. Returns whether that can be: not where a bias of the attention (ALiBi) counts from the end of the
    longest row.
    """
    attentions = [node for node in graph.nodes if node.operator == ATTENTION]
    if not attentions or any(len(node.inputs) > _ATTENTION_BIAS for node in attentions):
        return False
    graph.add_vector_input(LAST_POSITIONS, _INT32, None)
    for node in attentions:
        node.inputs[_LENGTHS] = LAST_POSITIONS
    remove_unused(graph)
    return True


def _leave_out_padding(graph: OnnxGraph, bias: str) -> str:
    """The part of a bias that is not about padding; "" when nothing is left."""
    source = graph.producer(bias)
    if source is None or _PADDING not in source.inputs:
        return bias
    if source.operator == "Expand":
        return ""
    if source.operator == "Add" and len(source.inputs) == 2:
        return next(name for name in source.inputs if name != _PADDING)
    raise _damaged(f"an attention's bias comes from {source.operator}")


@_readable()
def remove_unused(graph: OnnxGraph) -> None:
    """Drop the nodes whose results are not read; onnxruntime would compute them."""
    if any(node.has_subgraph() for node in graph.nodes):
        return
    used = set(graph.outputs())
    kept = []
    for node in reversed(graph.nodes):  # nodes are in order: readers of a result stand behind its node
        if used.intersection(node.outputs):
            used.update(node.inputs)
            kept.append(node)
    graph.nodes[:] = reversed(kept)


@_readable()
def _take_apart(data: bytes) -> tuple[WireMessage, WireMessage, list[Node]]:
    model = WireMessage(data)
    graphs = model.chunks(_MODEL_GRAPH)
    if len(graphs) != 1:
        raise WireError(f"{len(graphs)} graphs instead of one")
    graph = WireMessage(graphs[0])
    nodes = [Node(WireMessage(chunk)) for chunk in graph.chunks(_GRAPH_NODE)]
    model.remove(_MODEL_GRAPH)
    graph.remove(_GRAPH_NODE)
    return model, graph, nodes
