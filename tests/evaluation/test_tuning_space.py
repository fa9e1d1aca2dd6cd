"""What is tried on which machine, and how far settings may go."""

import dataclasses

import pytest
from sample_artifacts import make_manifest

from normistral.artifact.manifest import RecipeRecord
from normistral.errors import UsageError
from normistral.hardware import Machine, explain_openvino, limit_instruction_sets, plan_openvino
from normistral.runtime.collect_env import heuristic_settings
from normistral.runtime.engines.settings import CHUNK, override
from normistral.runtime.tuned import Tuned, find_strange_setting, make_key
from normistral.tuning import WORKLOADS, Workload, choose_workload, quality_bound, variants_to_try

AVX2 = frozenset({"sse4_2", "avx", "avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw"}
VNNI = AVX512 | {"avx512_vnni"}
BF16 = VNNI | {"avx512_bf16", "avx_vnni"}
AMX = BF16 | {"avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"}
CHAT = WORKLOADS["chat"]


def machine(instruction_sets=AVX2, cores=4, logical=8, quota=None):
    return Machine("x", cores, logical, quota, frozenset(instruction_sets), 2**34, 2**34)


def manifest(weights="int4", format="openvino", graph=None, **changes):
    return make_manifest(format=format, recipe=RecipeRecord(weights, graph=graph), **changes)


def tried(machine, manifest, work=CHAT, **start):
    return list(variants_to_try(machine, manifest, work, start))


def values(variants, name):
    return [variant[name] for variant in variants if name in variant]


@pytest.mark.parametrize(
    ("instruction_sets", "weights", "expected"),
    [
        (AVX2, "int4", ["f32 0"]),
        (AVX512, "int8", ["f32 0"]),
        (VNNI, "int4", ["f32 0", "f32 32", "f32 64", "f32 128"]),
        (VNNI, "fp16", ["f32 0"]),
        (BF16, "int8", ["f32 0", "f32 32", "f32 64", "f32 128", "bf16 0", "bf16 64"]),
        (BF16, "fp16", ["f32 0", "bf16 0"]),
        (AMX, "int4", ["f32 0", "f32 32", "f32 64", "f32 128", "bf16 0", "bf16 64", "f16 0", "f16 64"]),
        ({"asimd", "asimdhp", "bf16"}, "fp16", ["f32 0", "bf16 0", "f16 0"]),
        ((), "int4", ["f32 0", "f32 32", "f32 64", "f32 128"]),  # nothing is known: activations are tried
    ],
)
def test_arithmetic_is_what_the_instruction_sets_can_speed_up(instruction_sets, weights, expected):
    keys = ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    variants = [variant for variant in tried(machine(instruction_sets), manifest(weights)) if keys[0] in variant]
    assert [" ".join(variant[key] for key in keys) for variant in variants] == expected


@pytest.mark.parametrize(
    ("cores", "logical", "quota", "expected"),
    [
        (1, 1, None, []),
        (1, 2, None, ["2"]),
        (2, 2, None, ["1"]),
        (4, 8, None, ["2", "3", "8"]),
        (64, 128, None, ["32", "63", "128"]),
        (8, 16, 2.0, ["1", "3", "4", "8"]),
        (8, 16, 1.5, ["1", "3", "4", "8"]),
        (2, 4, 0.5, ["2"]),
    ],
)
def test_threads_are_tried_around_the_rules(cores, logical, quota, expected):
    variants = tried(machine(cores=cores, logical=logical, quota=quota), manifest())
    assert values(variants, "INFERENCE_NUM_THREADS") == expected
    assert {"ENABLE_CPU_PINNING": "NO"} in variants
    for variant in variants:  # OpenVINO keeps to one thread a core unless it is told
        more_than_cores = int(variant.get("INFERENCE_NUM_THREADS", 0)) > cores
        assert ("ENABLE_HYPER_THREADING" in variant) == more_than_cores


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (Workload(200, 1), ["64", "128", "256"]),
        (Workload(1024, 1), ["64", "128", "256", "512", "1024"]),
        (Workload(64, 1), ["64"]),
        (Workload(5000, 1), ["64", "128", "256", "512", "1024"]),
    ],
)
def test_a_prompt_is_cut_in_ways_that_differ(work, expected):
    assert values(tried(machine(), manifest(), work), "prefill_chunk") == expected


@pytest.mark.parametrize(
    ("weights", "graph", "levels", "bits"),
    [("int4", "fused", ["1", "4"], []), ("int8", "fused", [], ["8", "16"]), ("fp32", "plain", [], [])],
)
def test_onnx_varies_how_activations_are_rounded_where_they_are(weights, graph, levels, bits):
    variants = tried(machine(), manifest(weights, "onnx", graph))
    assert values(variants, "accuracy_level") == levels
    assert values(variants, "activation_bits") == bits
    assert values(variants, "session.intra_op.allow_spinning") == ["0", "1"]
    assert values(variants, "intra_op_num_threads") == ["2", "3", "8"]


def test_the_search_begins_with_the_usual_settings():
    described = machine(VNNI)
    rule = heuristic_settings(described, manifest())
    assert plan_openvino(described, "int4").items() <= rule.items()
    assert rule["prefill_chunk"] == "256"
    assert heuristic_settings(described, manifest("int4", "onnx", "fused"))["intra_op_num_threads"] == "4"


def test_our_kernel_is_compared_where_it_serves():
    ours = tried(machine(), manifest(), int4_kernel="normistral")
    assert ours[0] == {"int4_kernel": "openvino"}
    assert tried(machine(), manifest(), int4_kernel="openvino") == ours[1:]


# The work


@pytest.mark.parametrize(("context", "prompt"), [(4096, 1024), (1024, 1008), (64, 48)])
def test_a_short_context_makes_a_short_prompt(context, prompt):
    assert choose_workload("documents", context) == Workload(prompt, 32)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UsageError, match="there is no profile 'speed'") as caught:
        choose_workload("speed", 4096)
    assert caught.value.hint == "take one of: chat, documents, batch"
    with pytest.raises(UsageError, match="a context of 20 tokens is too short"):
        choose_workload("chat", 20)


# The bound


@pytest.mark.parametrize(
    ("quality", "bound"),
    [
        (None, 0.005),
        ({}, 0.005),
        ({"probe_kl_nats": 0.0048}, 0.0024),
        ({"probe_kl_nats": 1e-6}, 0.001),
        ({"probe_kl_nats": 0.34}, 0.02),
    ],
)
def test_settings_may_cost_half_of_what_rounding_cost(quality, bound):
    assert quality_bound(manifest(quality=quality)) == pytest.approx(bound)


# Limits in the environment, and the settings' own rules


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        ("AVX2", AVX2),
        ("avx2", AVX2),
        ("AVX512_CORE", AVX512),
        ("AVX512_CORE_VNNI", VNNI),
        ("AVX512_CORE_BF16", VNNI | {"avx512_bf16"}),
        ("AVX512_CORE_AMX", AMX),
        ("ALL", AMX),
        ("", AMX),
        ("NONSENSE", AMX),
    ],
)
def test_onednns_limit_is_the_machines(limit, left):
    assert limit_instruction_sets(AMX, {"ONEDNN_MAX_CPU_ISA": limit}) == left
    assert limit_instruction_sets(AMX, {"DNNL_MAX_CPU_ISA": limit}) == left
    assert limit_instruction_sets(AVX2, {"ONEDNN_MAX_CPU_ISA": limit}) == AVX2


@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE"])
def test_a_limited_machine_gets_the_rule_of_such_a_machine(limit):
    limited = dataclasses.replace(
        machine(), instruction_sets=limit_instruction_sets(AMX, {"ONEDNN_MAX_CPU_ISA": limit})
    )
    plan = plan_openvino(limited, "int4")
    assert (plan["INFERENCE_PRECISION_HINT"], plan["DYNAMIC_QUANTIZATION_GROUP_SIZE"]) == ("f32", "0")


@pytest.mark.parametrize(
    ("size", "taken"), [("1", True), ("4096", True), ("4097", False), ("0", False), ("64 ", False)]
)
def test_a_piece_of_a_prompt_has_a_sensible_size(size, taken):
    if taken:
        assert override({}, {"prefill_chunk": size}, {}, engine="x", exact=True)["prefill_chunk"] == size
    else:
        with pytest.raises(UsageError, match="prefill_chunk cannot be"):
            override({}, {"prefill_chunk": size}, {"prefill_chunk": CHUNK}, engine="x", exact=False)


@pytest.mark.parametrize("weights", ["int4", "int8", "fp16"])
@pytest.mark.parametrize("instruction_sets", [(), AVX2, AVX512, VNNI, AMX])
def test_the_reasons_are_those_of_the_rule(instruction_sets, weights):
    described = machine(instruction_sets)
    plan, reasons = plan_openvino(described, weights), "\n".join(explain_openvino(described, weights))
    assert ("f32: " in reasons) == (plan.get("INFERENCE_PRECISION_HINT") == "f32")
    assert ("\ndynamic quantisation: " in reasons) == (plan.get("DYNAMIC_QUANTIZATION_GROUP_SIZE", "0") != "0")
    assert ("no dynamic quantisation" in reasons) == (plan.get("DYNAMIC_QUANTIZATION_GROUP_SIZE") == "0")


@pytest.mark.parametrize("format", ["openvino", "onnx"])
@pytest.mark.parametrize("weights", ["int4", "int8", "fp16"])
@pytest.mark.parametrize("sets", [frozenset(), AVX2, VNNI, AMX])
def test_whatever_a_search_may_come_to_is_taken_when_it_is_loaded(format, weights, sets):
    """The usual settings and every variant; `normistral.runtime.tuned` refuses all else."""
    here = machine(sets, cores=4, logical=8)
    made = manifest(weights, format, graph="fused" if format == "onnx" else None)
    rule = heuristic_settings(here, made)
    variants = [variant for work in WORKLOADS.values() for variant in variants_to_try(here, made, work, rule)]
    engine = "openvino" if format == "openvino" else "onnxruntime"
    key = make_key(None, here, engine, "1", "CPU")
    for settings in ({}, *variants):
        tuned = Tuned(key, "x", "2026-11-29", "chat", rule | settings, tuple(settings), 1.0, 1.0, 0.0, 0.0, True)
        assert find_strange_setting(tuned) is None
