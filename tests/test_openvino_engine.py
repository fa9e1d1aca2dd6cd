"""What only the OpenVINO engine has: its names of devices, its settings. What engines share is in test_engines.py."""

import pytest

import normistral
from normistral.errors import DeviceError
from normistral.runtime.engines.openvino import require_device


def test_exact_is_reference_arithmetic(tiny_fp16):
    with normistral.load(tiny_fp16) as one, normistral.load(tiny_fp16, exact=True) as other:
        assert other.capabilities.settings["KV_CACHE_PRECISION"] == "f32"
        assert "KV_CACHE_PRECISION" not in one.capabilities.settings


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
