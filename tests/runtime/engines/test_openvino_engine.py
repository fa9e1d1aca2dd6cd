"""What only the OpenVINO engine has: its names of devices, its settings. What engines share is in test_engines.py."""

import os
import subprocess
import sys

import pytest

import normistral
from normistral.errors import DeviceError, UsageError
from normistral.hardware import read_machine
from normistral.runtime.engines.openvino import require_device


def test_exact_is_reference_arithmetic(tiny_fp16):
    with normistral.load(tiny_fp16) as one, normistral.load(tiny_fp16, exact=True) as other:
        assert other.capabilities.settings["KV_CACHE_PRECISION"] == "f32"
        assert (
            one.capabilities.settings["KV_CACHE_PRECISION"] == "f16"
        )  # OpenVINO's own choice, said though nobody asked


def test_given_settings_go_over_the_plan_and_reach_the_report(tiny_fp16):
    chosen = {
        "INFERENCE_NUM_THREADS": "1",
        "KV_CACHE_PRECISION": "f32",
        "ENABLE_CPU_PINNING": "NO",
        "prefill_chunk": "7",
    }
    with normistral.load(tiny_fp16, settings=chosen) as model:
        assert chosen.items() <= model.capabilities.settings.items()
        assert model.capabilities.settings["INFERENCE_PRECISION_HINT"] == "f32"  # the plan's, as before
        assert model.capabilities.prefill_chunk == 7
        assert model.capabilities.overrides == tuple(sorted(chosen))


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"INFERENCE_NUM_THREAD": "1"}, "OpenVINO has no setting 'INFERENCE_NUM_THREAD' here", "INFERENCE_NUM_THREADS"),
        ({"CACHE_DIR": "x"}, "no setting 'CACHE_DIR'", "KV_CACHE_PRECISION"),
        ({"LOG_LEVEL": "LOG_INFO"}, "no setting 'LOG_LEVEL'", "prefill_chunk"),
        ({"INFERENCE_NUM_THREADS": "2x"}, "cannot be '2x'", "1 to 9999"),  # OpenVINO would take 2
        ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "-5"}, "cannot be '-5'", "0 to 99999"),  # and here 2^64 - 5
        ({"KV_CACHE_PRECISION": "i3"}, "Supported values: u8", "take one"),
        ({"INFERENCE_NUM_THREADS": "4000"}, "does not take INFERENCE_NUM_THREADS=4000: it uses", "leave it out"),
        ({"prefill_chunk": "0"}, "prefill_chunk cannot be '0'", "1 to 4096"),
        ({"INFERENCE_NUM_THREADS": 2}, "cannot be 2", "a number from 1 to 9999, as a text: '2'"),
    ],
)
def test_a_setting_that_openvino_would_not_take_as_given_is_refused(tiny_fp16, settings, message, hint):
    with pytest.raises(UsageError) as caught:
        normistral.load(tiny_fp16, settings=settings)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", ["INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
def test_exact_keeps_its_arithmetic(tiny_fp16, name):
    value = "64" if name.endswith("SIZE") else "bf16"
    with pytest.raises(UsageError, match="would change the reference arithmetic") as caught:
        normistral.load(tiny_fp16, exact=True, settings={name: value})
    assert "INFERENCE_NUM_THREADS" in caught.value.hint
    assert name not in caught.value.hint
    with normistral.load(tiny_fp16, exact=True, settings={"INFERENCE_NUM_THREADS": "1"}) as model:
        assert model.capabilities.settings["INFERENCE_NUM_THREADS"] == "1"


_ASK_INSTRUCTION_SET = """
import openvino as ov
from normistral.hardware import read_machine
x = ov.opset13.parameter([1, 8], ov.Type.f32)
compiled = ov.Core().compile_model(ov.Model([ov.opset13.relu(x)], [x]), "CPU")
print(compiled.get_property("RUNTIME_REQUIREMENTS"), "/", *sorted(read_machine().instruction_sets))
"""


@pytest.mark.parametrize(
    ("limit", "left_out"), [("AVX2", {"avx512f", "avx512_vnni"}), ("AVX512_CORE", {"avx512_vnni", "avx512_bf16"})]
)
def test_a_limit_of_instruction_sets_is_read_as_openvino_reads_it(limit, left_out):
    if not {"avx2", "avx512f"} <= read_machine().instruction_sets:
        pytest.skip("there is nothing to be limited on this processor")
    done = subprocess.run(
        [sys.executable, "-c", _ASK_INSTRUCTION_SET],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": limit},
        capture_output=True,
        text=True,
        check=True,
    )
    engine, _, ours = done.stdout.partition(" / ")
    assert engine.endswith(
        {"AVX2": "isa=Intel AVX2", "AVX512_CORE": "AVX512BW, AVX512VL, and AVX512DQ extensions"}[limit]
    )
    assert not left_out & set(ours.split())
    assert "avx2" in ours


@pytest.mark.parametrize("device", ["GPU", "NPU", "CUDA", "", "AUTO:GPU"])
def test_a_device_that_is_not_there_is_an_error_that_lists_those_that_are(device):
    with pytest.raises(DeviceError) as caught:
        require_device(device, ["CPU"])
    assert "CPU" in caught.value.hint


@pytest.mark.parametrize(
    ("device", "available"),
    [
        ("CPU", ["CPU"]),
        ("AUTO", ["CPU"]),
        ("GPU", ["CPU", "GPU.0", "GPU.1"]),
        ("GPU.1", ["CPU", "GPU.0", "GPU.1"]),
        ("GPU.0", ["CPU", "GPU"]),
        ("AUTO:GPU,CPU", ["CPU", "GPU"]),
    ],
)
def test_devices_that_are_there_are_taken(device, available):
    require_device(device, available)
