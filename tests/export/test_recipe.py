from __future__ import annotations

import gc
from dataclasses import replace

import pytest

from normistral.artifact.manifest import Architecture, RecipeRecord
from normistral.errors import ResourceError, UsageError
from normistral.export import pipeline, resources
from normistral.export.quantize.plan import choose_plan
from normistral.export.recipe import (
    PER_CHANNEL,
    UNSTATED_CONTEXT,
    Recipe,
    choose_context,
    choose_group_size,
    choose_recipe,
    describe_choices,
    describe_recipe,
    estimate_weight_bytes,
    record_recipe,
)

SEVEN_B = Architecture(
    name="MistralForCausalLM",
    model_type="mistral",
    hidden_size=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    feed_forward=14336,
    vocabulary=32768,
    sliding_window=4096,
    tied_embeddings=False,
    parameters=7_248_023_552,
)
DEMO = replace(
    SEVEN_B,
    hidden_size=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    feed_forward=1536,
    vocabulary=49152,
    tied_embeddings=True,
    parameters=134_515_008,
)
ALIBI = replace(SEVEN_B, name="BloomForCausalLM", model_type="bloom", positions="alibi", sliding_window=None)
GB = 10**9


def test_group_size_is_the_largest_that_divides_all_widths():
    assert choose_group_size(SEVEN_B, Recipe()) == 128
    assert choose_group_size(DEMO, Recipe()) == 64
    # The output projection reads 32 × 99 features.
    assert choose_group_size(replace(SEVEN_B, head_dim=99), Recipe()) == 32
    assert choose_group_size(replace(DEMO, hidden_size=100), Recipe()) == PER_CHANNEL


def test_group_sizes_are_for_weights_that_have_groups():
    assert choose_group_size(DEMO, Recipe("int8")) is None
    assert choose_group_size(DEMO, Recipe("int8", group_size=PER_CHANNEL)) is None
    assert choose_group_size(DEMO, Recipe("int8", group_size=32)) == 32
    with pytest.raises(UsageError, match="group size 128 does not divide"):
        choose_group_size(DEMO, Recipe("int8", group_size=128))
    assert choose_group_size(DEMO, Recipe("int8", format="onnx")) == 64
    assert choose_group_size(DEMO, Recipe("fp32", format="onnx")) is None


def test_onnx_has_no_scale_per_channel_to_fall_back_on():
    with pytest.raises(UsageError) as error:
        choose_group_size(replace(DEMO, hidden_size=100), Recipe(format="onnx"))
    assert error.value.message == "no group size divides all of the model's widths 100, 576, 1536"
    assert error.value.hint == "use fp16 weights, or --format openvino"


def test_a_group_size_that_was_asked_for_is_used_or_refused():
    assert choose_group_size(SEVEN_B, Recipe(group_size=32)) == 32
    assert choose_group_size(DEMO, Recipe(group_size=PER_CHANNEL)) == PER_CHANNEL
    with pytest.raises(UsageError) as error:
        choose_group_size(DEMO, Recipe(group_size=128))
    assert error.value.message == "group size 128 does not divide all of the model's widths 576, 1536"
    assert error.value.hint == "for this model choose one of: 64, 32, 16, -1"
    with pytest.raises(UsageError) as error:
        choose_group_size(DEMO, Recipe(format="onnx", group_size=128))
    assert error.value.hint == "for this model choose one of: 64, 32, 16"


def test_the_context_is_the_checkpoints_or_less():
    assert choose_context(SEVEN_B, 4096, Recipe()) == 4096
    assert choose_context(SEVEN_B, 1_024_000, Recipe()) == 1_024_000
    assert choose_context(SEVEN_B, 1_024_000, Recipe(format="onnx")) == 32768  # the length of the rotary tables
    assert choose_context(SEVEN_B, 1_024_000, Recipe("fp16", format="onnx")) == 1_024_000
    assert choose_context(SEVEN_B, 1_024_000, Recipe(format="onnx", context_length=100_000)) == 100_000
    with pytest.raises(UsageError) as error:
        choose_context(SEVEN_B, 4096, Recipe(context_length=4097))
    assert error.value.message == "the context of 4097 tokens is beyond the checkpoint's 4096"


def test_alibi_has_no_table_and_perhaps_no_stated_context():
    assert choose_context(ALIBI, 65536, Recipe(format="onnx")) == 65536
    for recipe in (Recipe(), Recipe(format="onnx")):
        context = choose_context(ALIBI, None, recipe)
        assert context == UNSTATED_CONTEXT == 2048
        notes = list(describe_choices(ALIBI, None, recipe, 128, context))
        assert notes[-1] == (
            "context: the checkpoint gives none, and ALiBi has no limit of its own: 2048 tokens are taken; "
            "--context N sets another"
        )
    assert choose_context(ALIBI, None, Recipe(context_length=10_000)) == 10_000


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ("int4", {"gruop_size": 64}, "unknown option gruop_size"),
        ("int3", {}, "weights must be one of int4, int8, fp16, fp32, not 'int3'"),
        ("int4", {"group_size": 48}, "not 48"),
        ("int4", {"group_size": True}, "not True"),
        ("int4", {"symmetric": 1}, "not 1"),
        ("int4", {"ratio": 0.0}, "ratio must be a number above 0"),
        ("int4", {"ratio": True}, "ratio must be a number"),
        ("int4", {"ratio": float("nan")}, "not nan"),
        ("int4", {"backup": "int7"}, "not 'int7'"),
        ("int4", {"output_layer_bits": 5}, "one of 4, 8, not 5"),
        ("int4", {"backup": "fp"}, "an output layer of 8 bits needs an 8-bit backup"),
        ("int8", {"group_size": 48}, "not 48"),
        ("int8", {"recipe": "best", "ratio": 0.5}, "ratio means nothing for int8 weights in OpenVINO"),
        ("fp16", {"symmetric": False}, "symmetric means nothing for fp16 weights in OpenVINO"),
        ("int4", {"graph": "fused"}, "graph means nothing for int4 weights in OpenVINO"),
        ("fp32", {}, "OpenVINO artifacts have no fp32 weights"),
        ("int4", {"context_length": 15}, "at least 16 tokens, not 15"),
        ("int4", {"context_length": True}, "at least 16 tokens, not True"),
        ("int4", {"format": "gguf"}, "format must be one of openvino, onnx, not 'gguf'"),
        ("int4", {"format": "onnx", "graph": "mixed"}, "graph must be one of None, fused, plain, not 'mixed'"),
        ("int4", {"format": "onnx", "graph": "plain"}, "a plain graph has no int4 weights"),
        ("int8", {"format": "onnx", "graph": "plain"}, "a plain graph has no int8 weights"),
        (
            "int4",
            {"format": "onnx", "recipe": "fast", "ratio": 0.5},
            "the recipe fast rounds all layers alike in ONNX, so a ratio of 0.5",
        ),
        ("int4", {"format": "onnx", "group_size": -1}, "one scale per channel (-1) is not possible"),
        ("int8", {"format": "onnx", "backup": "int8_sym"}, "backup means nothing for int8 weights in ONNX"),
        ("fp32", {"format": "onnx", "group_size": 64}, "group_size means nothing for fp32 weights in ONNX"),
    ],
)
def test_impossible_and_meaningless_options_are_refused(weights, options, words):
    options = dict(options)
    with pytest.raises(UsageError) as error:
        choose_recipe(options.pop("format", "openvino"), weights, options)
    assert words in error.value.message


def test_the_manifest_keeps_only_what_means_something():
    assert record_recipe(Recipe("fp16"), None) == RecipeRecord("fp16")
    assert record_recipe(Recipe("int8"), None) == RecipeRecord("int8", symmetric=True, recipe="fast")
    assert record_recipe(Recipe(), 64) == RecipeRecord("int4", False, 64, 1.0, "int8_asym", 8, recipe="best")
    assert describe_recipe(Recipe(recipe="fast", ratio=0.8), 64) == (
        "int4 symmetric, group 64, 80% of the layers, output layer int8_asym"
    )
    assert describe_recipe(Recipe(ratio=0.65, recipe="best"), 64) == (
        "int4 asymmetric, group 64, 35% of the weights in int8, output layer int8_asym, recipe best"
    )


def test_the_manifest_keeps_the_graph_of_onnx():
    fused = Recipe("int8", format="onnx", symmetric=False)
    assert record_recipe(fused, 32) == RecipeRecord(
        "int8", symmetric=False, group_size=32, graph="fused", recipe="fast"
    )
    assert describe_recipe(fused, 32) == "int8 asymmetric, group 32, fused graph"
    assert record_recipe(Recipe("fp16", format="onnx"), None) == RecipeRecord("fp16", graph="plain")
    assert record_recipe(Recipe("fp16", format="onnx", graph="fused"), None) == RecipeRecord("fp16", graph="fused")


def test_sizes_match_exported_artifacts():
    # openvino_model.bin of real exports: the demo, and a random model of 8 layers at the 7B's width
    assert estimate_weight_bytes(DEMO, Recipe(recipe="fast"), 64) == pytest.approx(85_001_925, rel=0.01)
    assert estimate_weight_bytes(DEMO, Recipe("int8"), None) == pytest.approx(135_030_149, rel=0.01)
    # model.onnx.data of real exports
    assert estimate_weight_bytes(DEMO, Recipe(format="onnx"), 64) == pytest.approx(90_732_544, rel=0.01)
    mixed = Recipe(recipe="best", ratio=0.66)
    assert estimate_weight_bytes(DEMO, mixed, 64) == pytest.approx(103_576_197, rel=0.01)
    assert estimate_weight_bytes(DEMO, replace(mixed, format="onnx"), 64) == pytest.approx(111_552_512, rel=0.03)
    assert estimate_weight_bytes(DEMO, Recipe("int8", group_size=64), 64) == pytest.approx(138_823_381, rel=0.01)
    eighth = replace(SEVEN_B, layers=8, parameters=2_013_335_552)
    assert estimate_weight_bytes(eighth, Recipe(), 128) == pytest.approx(1_168_310_877, rel=0.01)
    assert estimate_weight_bytes(eighth, Recipe(output_layer_bits=4), 128) == pytest.approx(1_103_200_877, rel=0.01)
    assert estimate_weight_bytes(eighth, Recipe("fp16"), None) == pytest.approx(4_026_532_381, rel=0.01)


def test_memory_of_the_whole_7b_stays_within_its_bounds():
    gib = 2**30
    assert 3.5 * gib < resources.estimate_needs(SEVEN_B, Recipe(recipe="fast"), 128).memory < 5 * gib
    assert 6.7 * gib < resources.estimate_needs(SEVEN_B, Recipe("int8"), 128).memory < 8 * gib
    assert resources.estimate_needs(SEVEN_B, Recipe("fp16"), None).memory < gib
    assert resources.estimate_needs(SEVEN_B, Recipe(format="onnx", recipe="fast"), 128).memory < 1.5 * gib


def test_only_int4_at_its_best_has_zero_points_unless_they_are_asked_for():
    assert not Recipe().is_symmetric
    assert Recipe(recipe="fast").is_symmetric
    assert Recipe(recipe="balanced").is_symmetric
    assert Recipe("int8", recipe="best").is_symmetric
    assert not Recipe(recipe="best").is_symmetric
    assert Recipe(recipe="best", symmetric=True).is_symmetric
    assert not Recipe(recipe="fast", symmetric=False).is_symmetric


def test_a_calibration_holds_one_layer_and_what_gptq_needs():
    """Hessian of 14,336 inputs and its factor: 1.6 GB; what flows: 1.2 GB. A layer's calibration took 2.7 GiB."""
    gib = 2**30
    for format in ("openvino", "onnx"):
        best = resources.estimate_needs(SEVEN_B, Recipe(format=format, recipe="best"), 128)
        assert 3.0 * gib < best.memory < (5.0 if format == "openvino" else 4.2) * gib  # OpenVINO's: while it is written
        plain = resources.estimate_needs(SEVEN_B, Recipe(format=format, recipe="fast"), 128)
        assert 3.7 * gib < best.disk - plain.disk < 4.2 * gib  # matrices, and twice both kinds of states of all tokens
    balanced = resources.estimate_needs(SEVEN_B, Recipe(format="onnx", recipe="balanced"), 128)
    assert 1.5 * gib < balanced.memory < 2.5 * gib
    mixed = resources.estimate_needs(SEVEN_B, Recipe(format="onnx", recipe="balanced", ratio=0.7), 128)
    assert 3.5 * gib < mixed.memory < 4.5 * gib  # states in front of every layer, a layer and its errors
    assert 0.8e9 < mixed.disk / 2 - balanced.disk / 2 < 1.2e9  # in files, and in the artifact
    grouped = resources.estimate_needs(SEVEN_B, Recipe("int8", group_size=128), 128)
    assert grouped.disk == pytest.approx(2 * estimate_weight_bytes(SEVEN_B, Recipe("int8", group_size=128), 128), 0.02)


def test_a_calibration_takes_as_long_as_it_did_when_it_was_measured():
    """114 s of one core for each of the 7B's 32 layers without the correction, on a busy machine."""
    assert 20 < resources.estimate_calibration_s(DEMO, choose_plan(Recipe(recipe="best"), 64), cores=1) < 100
    whole = resources.estimate_calibration_s(SEVEN_B, choose_plan(Recipe(recipe="best"), 128), cores=2)
    light = resources.estimate_calibration_s(SEVEN_B, choose_plan(Recipe(recipe="balanced"), 128), cores=2)
    plain = replace(choose_plan(Recipe(recipe="best"), 128), correction=0.0)
    assert 25 * 60 < resources.estimate_calibration_s(SEVEN_B, plan=plain, cores=2) < 40 * 60
    assert 40 * 60 < whole < 60 * 60
    assert 5 * 60 < light < whole / 2


def test_a_slower_or_busier_machine_takes_longer():
    plan = choose_plan(Recipe(recipe="best"), 64)
    usual = resources.estimate_calibration_s(DEMO, plan, cores=2)
    assert resources.estimate_calibration_s(DEMO, plan, 2, resources._REFERENCE_PRODUCTS_PER_S / 3) == pytest.approx(
        3 * usual
    )
    measured = resources.measure_matmul(cores=2)
    assert 1e8 < measured < 1e13


def test_the_machine_is_measured_only_for_a_calibration_that_takes_long(monkeypatch):
    """The products that are timed take longer than the whole calibration of a tiny model."""
    speeds = [resources._REFERENCE_PRODUCTS_PER_S / 3]
    monkeypatch.setattr(resources, "measure_matmul", lambda cores: speeds.pop())
    plan = choose_plan(Recipe(recipe="best"), 64)
    tiny = replace(DEMO, hidden_size=64, feed_forward=128, layers=2, vocabulary=512, parameters=150_000)
    assert resources.predict_calibration_s(tiny, plan, 2) == resources.estimate_calibration_s(tiny, plan, 2) < 1
    usual = resources.estimate_calibration_s(DEMO, plan, cores=2)
    assert resources.predict_calibration_s(DEMO, plan, 2) == pytest.approx(3 * usual)
    assert speeds == []


def test_a_shortage_is_said_with_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "free_disk_bytes", lambda path: 5 * GB)
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 2 * GB)
    resources.check_resources(tmp_path / "out", resources.ResourceNeeds(disk=5 * GB, memory=2 * GB))
    with pytest.raises(ResourceError) as error:
        resources.check_resources(tmp_path / "out", resources.ResourceNeeds(disk=6 * GB, memory=GB))
    assert error.value.message == (f"this export needs about 6.00 GB of disk at {tmp_path}; 5.00 GB are free")
    with pytest.raises(ResourceError) as error:
        resources.check_resources(tmp_path / "out", resources.ResourceNeeds(disk=GB, memory=3 * GB))
    assert error.value.message == "this export needs about 3.00 GB of memory; 2.00 GB are available"


def test_memory_for_the_tools_alone_is_judged_before_they_are_loaded(tmp_path, monkeypatch):
    """A container with 250 MB would end the process while it imports PyTorch."""
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 250_000_000)
    monkeypatch.setattr(pipeline, "require_export_tools", lambda format: pytest.fail("the tools were loaded"))
    with pytest.raises(ResourceError, match=r"0\.35 GB of memory for its tools alone; 0\.25 GB are available"):
        pipeline.export_model("demo", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_meter_sees_memory_that_came_and_went():
    size = 256 * 2**20  # far more than what earlier tests may still give back meanwhile
    gc.collect()
    with resources.MemoryMeter() as meter:
        before = resources.anonymous_bytes()
        block = bytearray(b"\x01") * size
        meter._stopping.wait(0.3)
        del block
    if before is None:
        pytest.skip("no /proc on this system")
    assert meter.peak_bytes is not None
    assert meter.peak_bytes >= before + 0.75 * size


def test_where_the_default_does_not_fit_the_thrifty_recipe_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 3 * GB)
    needs = {
        name: resources.estimate_needs(SEVEN_B, Recipe(format="onnx", recipe=name), 128) for name in ("best", "fast")
    }
    with pytest.raises(ResourceError) as error:
        resources.check_resources(tmp_path / "out", needs["best"], needs["fast"])
    assert "use --recipe fast: it takes 1." in error.value.hint
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 1 * GB)
    with pytest.raises(ResourceError) as error:
        resources.check_resources(tmp_path / "out", needs["best"], needs["fast"])
    assert "fast" not in error.value.hint
