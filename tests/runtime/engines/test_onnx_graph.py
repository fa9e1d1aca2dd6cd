"""The graph's own reader and writer, against the package `onnx`, and against damage."""

import random

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from normistral.errors import ArtifactError
from normistral.runtime.engines.onnx_graph import (
    LOGITS_START,
    OnnxGraph,
    accuracy_levels,
    attend_in_place,
    is_fused,
    keep_last_logits,
    remove_unused,
    set_accuracy_level,
)

EXPORTS = ("onnx-fp32-plain", "onnx-fp32-fused", "onnx-int4")


@pytest.fixture(scope="module", params=EXPORTS)
def data(request, tiny_onnx):
    return (tiny_onnx(request.param) / "model.onnx").read_bytes()


@pytest.fixture(scope="module")
def fused(tiny_onnx):
    return (tiny_onnx("onnx-int4") / "model.onnx").read_bytes()


def parsed(graph) -> onnx.ModelProto:
    return onnx.load_model_from_string(bytes(graph))


def canonical(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


def node_of(model, output):
    return next(node for node in model.graph.node if output in node.output)


def attribute(node, name):
    return next(helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name)


def small_model(*nodes, outputs=("logits",), initializers=()):
    """hidden [1, n, 4] and what the nodes make of it."""
    ports = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [1, "n", 4])]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(list(nodes), "g", ports, results, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()


# Reading and writing


def test_what_is_not_changed_is_written_as_it_was(data):
    graph = OnnxGraph(data)
    assert canonical(parsed(graph)) == canonical(onnx.load_model_from_string(data))
    assert graph.inputs() == [port.name for port in parsed(graph).graph.input]
    assert graph.outputs() == [port.name for port in parsed(graph).graph.output]
    assert graph.external_files() <= {"model.onnx.data"}


def test_every_kind_of_attribute_survives():
    tensor = numpy_helper.from_array(np.arange(3, dtype=np.float32), "t")
    values = {"f": 0.5, "i": -3, "s": "æøå", "t": tensor, "fs": [0.25, -1.0], "is": [-1, 2**40], "ss": ["a", "b"]}
    node = helper.make_node("Odd", ["hidden", "", "x"], ["logits", ""], domain="d", **values)
    assert canonical(parsed(OnnxGraph(small_model(node)))) == canonical(onnx.load_model_from_string(small_model(node)))


# Changes


def test_the_output_layer_gets_the_last_positions_only(data):
    graph = OnnxGraph(data)
    keep_last_logits(graph)
    model = parsed(graph)
    added = model.graph.input[-1]
    assert added.name == LOGITS_START
    assert added.type.tensor_type.elem_type == TensorProto.INT64
    assert [axis.dim_value for axis in added.type.tensor_type.shape.dim] == [1]
    layer = node_of(model, "logits")
    while layer.op_type in ("Cast", "Add"):
        layer = node_of(model, layer.input[0])
    cut = node_of(model, layer.input[0])
    assert (cut.op_type, cut.input[1]) == ("Slice", LOGITS_START)
    order = [node.name for node in model.graph.node]
    assert order.index(cut.name) < order.index(layer.name)


def test_casts_and_biases_behind_the_output_layer_are_seen_through():
    import onnxruntime as ort

    matrix = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    bias = numpy_helper.from_array(np.full(4, 10, np.float32), "b")
    nodes = [
        helper.make_node("MatMul", ["hidden", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["logits"], to=TensorProto.DOUBLE),
    ]
    model = onnx.load_model_from_string(small_model(*nodes, initializers=[matrix, bias]))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    graph = OnnxGraph(model.SerializeToString())
    keep_last_logits(graph)
    session = ort.InferenceSession(bytes(graph))
    hidden = np.arange(20, dtype=np.float32).reshape(1, 5, 4)
    (logits,) = session.run(None, {"hidden": hidden, LOGITS_START: np.array([-2])})
    assert np.array_equal(logits, hidden[:, -2:] + 10)


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [helper.make_node("Relu", ["hidden"], ["logits"])],
        [helper.make_node("Cast", ["a"], ["logits"], to=1), helper.make_node("Cast", ["logits"], ["a"], to=1)],
    ],
    ids=["no node", "no product", "a circle"],
)
def test_logits_that_come_from_elsewhere_are_refused(nodes):
    with pytest.raises(ArtifactError, match="logits"):
        keep_last_logits(OnnxGraph(small_model(*nodes)))


def test_exact_sets_every_level_and_nothing_else(fused):
    graph = OnnxGraph(fused)
    assert accuracy_levels(graph) == [4]
    set_accuracy_level(graph, 1)
    assert accuracy_levels(graph) == [1]
    expected = onnx.load_model_from_string(fused)
    for node in expected.graph.node:
        for entry in node.attribute:
            if entry.name == "accuracy_level":
                entry.i = 1
    found = parsed(graph)
    assert {node.name: sorted(map(str, node.attribute)) for node in found.graph.node} == {
        node.name: sorted(map(str, node.attribute)) for node in expected.graph.node
    }


def test_a_level_that_was_not_set_is_set():
    node = helper.make_node("MatMulNBits", ["hidden", "q", "s"], ["logits"], domain="com.microsoft", K=4, N=4)
    graph = OnnxGraph(small_model(node))
    assert accuracy_levels(graph) == [0]
    set_accuracy_level(graph, 1)
    assert attribute(node_of(parsed(graph), "logits"), "accuracy_level") == 1
    assert attribute(node_of(parsed(graph), "logits"), "K") == 4


def test_attention_reads_the_bound_past_and_no_padding(fused):
    graph = OnnxGraph(fused)
    assert is_fused(graph)
    attend_in_place(graph)
    model = parsed(graph)
    attentions = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attentions) == 2
    for layer, node in enumerate(attentions):
        assert node.input[3:5] == [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        assert len(node.input) == 9
    outputs = {name for node in model.graph.node for name in node.output}
    assert not {name for name in outputs if "mask.float" in name or "padding" in name or "mended" in name}


def test_a_plain_graph_is_not_fused(tiny_onnx):
    assert not is_fused(OnnxGraph((tiny_onnx("onnx-fp32-plain") / "model.onnx").read_bytes()))


def test_nodes_that_a_subgraph_may_read_are_kept():
    inner = helper.make_graph([helper.make_node("Relu", ["a"], ["x"])], "inner", [], [])
    nodes = [
        helper.make_node("Relu", ["hidden"], ["a"]),
        helper.make_node("If", ["hidden"], ["logits"], then_branch=inner, else_branch=inner),
    ]
    graph = OnnxGraph(small_model(*nodes))
    remove_unused(graph)
    assert len(graph.nodes) == 2
    graph = OnnxGraph(small_model(nodes[0], helper.make_node("Relu", ["hidden"], ["logits"])))
    remove_unused(graph)
    assert [list(node.output) for node in graph.nodes] == [["logits"]]


# Damage


def adapt(data):
    graph = OnnxGraph(data)
    graph.inputs(), graph.outputs(), graph.external_files()
    keep_last_logits(graph)
    attend_in_place(graph)
    set_accuracy_level(graph, 1)
    return bytes(graph)


def refusal(data):
    """What reading says, "" where it finds nothing wrong."""
    try:
        adapt(data)
    except ArtifactError as exc:
        return exc.message
    return ""


def test_a_truncated_graph_is_refused(data):
    chance = random.Random(1)
    said = [refusal(data[:length]) for length in [*range(60), *(chance.randrange(len(data)) for _ in range(100))]]
    # Cut where a field ends, it is a message still, but one without a graph or its logits.
    assert all("damaged" in message for message in said)


def test_flipped_bits_never_crash_the_reader(data):
    chance = random.Random(2)
    said = []
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 1, 8])):
            damaged[chance.randrange(min(len(data), 60_000))] ^= 1 << chance.randrange(8)
        said.append(refusal(bytes(damaged)))
    assert 5 < sum(map(bool, said)) < 100  # the rest changed names and numbers, which only a hash finds


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(noise):
    try:
        graph = OnnxGraph(noise)
    except ArtifactError:
        return
    assert canonical(parsed(graph)) == canonical(onnx.load_model_from_string(noise))


@pytest.mark.parametrize(
    "noise",
    [
        b"\x80" * 100,  # a number without an end
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # longer than the file
        b"\x0b",  # groups are not used
        b"\x00\x01",  # field 0
        b"\x3a\x02\x08",  # ends within a field
        b"",  # no graph
        b"\x3a\x05\x0a\x03\x0a\x01\xff",  # an input whose name is no UTF-8
    ],
)
def test_what_is_no_message_is_refused(noise):
    with pytest.raises(ArtifactError, match=r"model\.onnx is damaged"):
        OnnxGraph(noise)
