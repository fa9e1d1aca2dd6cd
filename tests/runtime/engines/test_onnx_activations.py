"""Activations in two int8 parts: on exported models, and on single products that onnxruntime runs."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_engines import TOKENS
from test_onnx_engine import distance, load

from normistral.artifact.artifact import Artifact
from normistral.errors import UsageError
from normistral.runtime.engines.onnx_activations import can_split, split_activations
from normistral.runtime.engines.onnx_graph import LAST_POSITIONS, OnnxGraph
from normistral.runtime.engines.onnxruntime import adapt_graph, load_onnx
from normistral.runtime.engines.settings import EngineConfig

COLUMNS, ROWS, BLOCK = 128, 24, 32


@pytest.fixture(scope="module")
def int8(tiny_onnx):
    return tiny_onnx("onnx-int8")


def load_fast(folder, **settings):
    return load_onnx(Artifact.open(folder, verify=False), EngineConfig(settings=settings))


def test_int8_is_nearly_exact_by_default(int8):
    exact = load(int8).create_engine().forward(TOKENS, last=48)
    default, coarse = load_fast(int8), load_fast(int8, activation_bits="8")
    assert default.capabilities.settings["activation_bits"] == "16"
    assert coarse.capabilities.settings["activation_bits"] == "8"
    lost = distance(default.create_engine().forward(TOKENS, last=48), exact)
    assert lost < distance(coarse.create_engine().forward(TOKENS, last=48), exact) / 30


def test_one_by_one_is_as_at_once(int8):
    at_once = load_fast(int8).create_engine().forward(TOKENS, last=48)
    engine = load_fast(int8).create_engine()
    one_by_one = np.concatenate([engine.forward([token]) for token in TOKENS])
    assert distance(one_by_one, at_once) < 1e-3


def test_a_kv_cache_of_other_activations_is_another(int8):
    keys = [load_fast(int8, activation_bits=bits).capabilities.kv_cache_key for bits in ("8", "16")]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(("bits", "takes_lengths"), [("8", True), ("16", False)])
def test_activations_in_two_parts_leave_no_rows_for_a_batch(bits, takes_lengths):
    attended = ["hidden", "k", "v", "past_key_values.0.key", "past_key_values.0.value", "lengths", "total"]
    nodes = [
        helper.make_node("GroupQueryAttention", attended, ["attention"], domain="com.microsoft"),
        helper.make_node("MatMulNBits", ["attention", "q", "s"], ["logits"], bits=8, K=64, N=4, block_size=32),
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = OnnxGraph(helper.make_model(helper.make_graph(nodes, "g", [], [logits])).SerializeToString())
    adapt_graph(graph, None, bits, lengths=True)
    assert (LAST_POSITIONS in graph.inputs()) is takes_lengths


def test_it_is_an_error_where_activations_are_not_rounded(int8, tiny_onnx):
    with pytest.raises(UsageError, match="activation_bits means nothing here") as caught:
        load_fast(int8, accuracy_level="1", activation_bits="16")
    assert "accuracy_level=4" in caught.value.hint
    with pytest.raises(UsageError, match="would change the reference arithmetic"):
        load(int8, settings={"activation_bits": "16"})
    with pytest.raises(UsageError, match="no setting 'activation_bits'"):
        load_fast(tiny_onnx("onnx-int4"), activation_bits="16")
    assert "activation_bits" not in load(int8).capabilities.settings
    assert "activation_bits" not in load_fast(int8, accuracy_level="1").capabilities.settings


# Single products


def model(*, bias=False, opset=18, bits=8):
    """Two products of one input x [1, n, 128]; and what they are multiplied with, as floats."""
    draw = np.random.default_rng(0)
    nodes, initializers, floats = [], [], []
    for index in range(2):
        qweight = draw.integers(0, 256, (ROWS, COLUMNS // BLOCK, BLOCK * bits // 8), dtype=np.uint8)
        scales = draw.random((ROWS, COLUMNS // BLOCK), dtype=np.float32)
        offset = draw.random(ROWS, dtype=np.float32) * 1000
        initializers += [
            numpy_helper.from_array(qweight, f"q{index}"),
            numpy_helper.from_array(scales, f"s{index}"),
            numpy_helper.from_array(offset, f"b{index}"),
        ]
        more = ["", "", f"b{index}"] if bias else []
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", f"q{index}", f"s{index}", *more],
                [f"y{index}"],
                domain="com.microsoft",
                K=COLUMNS,
                N=ROWS,
                bits=bits,
                block_size=BLOCK,
                accuracy_level=4,
            )
        )
        if bits == 8:
            values = (qweight.astype(np.float32) - 128) * scales[..., None]
            floats.append((values.reshape(ROWS, COLUMNS).T, offset if bias else 0))
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "n", COLUMNS])]
    results = [helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, None) for index in range(2)]
    graph = helper.make_graph(nodes, "g", ports, results, initializers)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(), floats


def run(data, x):
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_products_are_those_of_floats(bias, tokens):
    data, floats = model(bias=bias)
    graph = OnnxGraph(data)
    split_activations(graph)
    x = np.random.default_rng(1).standard_normal((1, tokens, COLUMNS), dtype=np.float32)
    x[:, :, 7] *= 300  # one large activation makes its block coarse
    x[:, :, BLOCK : 2 * BLOCK] = 0
    for found, coarse, (weights, offset) in zip(run(bytes(graph), x), run(data, x), floats, strict=True):
        expected = x @ weights + offset
        assert found.shape == expected.shape
        assert distance(found, expected) < 1e-4
        assert distance(coarse, expected) > 30 * distance(found, expected)


def test_products_of_one_input_share_its_parts():
    data, _ = model()
    graph = OnnxGraph(data)
    split_activations(graph)
    assert [node.op_type for node in graph.nodes].count("Round") == 1


def test_other_bits_and_older_operators_are_left_alone():
    assert can_split(OnnxGraph(model()[0]))
    assert not can_split(OnnxGraph(model(bits=4)[0]))
    assert not can_split(OnnxGraph(model(opset=17)[0]))
