"""Devices of ONNX artifacts, judged on profiles of real sessions."""

import builtins
import json

import normistral  # isort: skip  (turns onnxruntime's telemetry off)
import onnxruntime as ort
import pytest

from normistral.artifact.manifest import read_manifest
from normistral.errors import DeviceError, MissingExtraError, NormistralError
from normistral.runtime.engines import onnxruntime as engine
from normistral.runtime.providers import PROVIDERS, device_names, find_astray, find_target, require_all_on

CPU = ["AzureExecutionProvider", "CPUExecutionProvider"]
EVERYTHING = [provider.name for provider in PROVIDERS.values()]


@pytest.mark.parametrize(
    ("device", "provider", "options", "place"),
    [
        ("CPU", "CPUExecutionProvider", {}, ("cpu", 0)),
        ("CUDA", "CUDAExecutionProvider", {}, ("cuda", 0)),
        ("CUDA:1", "CUDAExecutionProvider", {"device_id": "1"}, ("cuda", 1)),
        ("ROCM:2", "ROCMExecutionProvider", {"device_id": "2"}, ("cuda", 2)),
        ("MIGRAPHX", "MIGraphXExecutionProvider", {}, ("cuda", 0)),
        ("DIRECTML:1", "DmlExecutionProvider", {"device_id": "1"}, ("dml", 1)),
        ("OPENVINO", "OpenVINOExecutionProvider", {"device_type": "CPU"}, ("cpu", 0)),
        ("OPENVINO:GPU.1", "OpenVINOExecutionProvider", {"device_type": "GPU.1"}, ("cpu", 0)),
        ("COREML", "CoreMLExecutionProvider", {}, ("cpu", 0)),
    ],
)
def test_devices_are_providers(device, provider, options, place):
    target = find_target(device, EVERYTHING)
    assert (target.provider, target.options) == (provider, options)
    assert (target.memory, target.memory_index) == place
    assert target.is_cpu == (device == "CPU")


def test_exact_turns_the_providers_shortcuts_off():
    assert find_target("CUDA:1", EVERYTHING, exact=True).options == {"use_tf32": "0", "device_id": "1"}
    assert find_target("OPENVINO", EVERYTHING, exact=True).options == {"precision": "FP32", "device_type": "CPU"}


@pytest.mark.parametrize(
    ("device", "package"),
    [
        ("CUDA", 'pip install "normistral[gpu]"'),
        ("CUDA:1", 'pip install "normistral[gpu]"'),
        ("ROCM", "onnxruntime-rocm"),
        ("MIGRAPHX", "onnxruntime-migraphx"),
        ("DIRECTML", "onnxruntime-directml"),
        ("OPENVINO:GPU", "onnxruntime-openvino"),
        ("COREML", "macOS"),
    ],
)
def test_a_missing_provider_names_what_is_there_and_the_package(device, package):
    with pytest.raises(DeviceError, match=PROVIDERS[device.partition(":")[0]].name) as caught:
        find_target(device, CPU)
    assert package in caught.value.hint
    assert "has: CPU" in caught.value.hint


@pytest.mark.parametrize("device", ["", "GPU", "cuda", "TPU:0", "CPU:0", "CUDA:", "CUDA:x", "CUDA:-1", "OPENVINO:"])
def test_an_unknown_device_is_an_error(device):
    with pytest.raises(DeviceError, match=f"no device '{device}'"):
        find_target(device, EVERYTHING)


def test_names_of_what_is_installed():
    assert device_names(CPU) == ["CPU"]
    assert device_names(["OpenVINOExecutionProvider", *CPU]) == ["CPU", "OPENVINO"]


def test_load_refuses_a_device_that_is_not_there(tiny_onnx):
    with pytest.raises(DeviceError, match="CUDAExecutionProvider") as caught:
        normistral.load(tiny_onnx("onnx-fp32-plain"), device="CUDA")
    assert "normistral[gpu]" in caught.value.hint


def test_a_missing_onnxruntime_names_the_extra(tiny_onnx, monkeypatch):
    real = builtins.__import__

    def without_onnxruntime(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_onnxruntime)
    with pytest.raises(MissingExtraError) as caught:
        normistral.load(tiny_onnx("onnx-fp32-plain"))
    assert 'pip install "normistral[onnx]"' in caught.value.hint


# Where nodes ran


@pytest.fixture(scope="module", params=["onnx-fp32-plain", "onnx-int4"])
def profile(request, tiny_onnx, tmp_path_factory):
    """Of a real run on the CPU provider."""
    folder = tiny_onnx(request.param)
    manifest = read_manifest(folder)
    graph = engine.read_graph(folder, manifest)
    engine.adapt_graph(graph, None)
    options = engine.session_options({}, folder)
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path_factory.mktemp("profile") / "p")
    cpu = find_target("CPU", CPU)
    session = engine.open_session(bytes(graph), options, cpu, folder.name)
    in_place = "int4" in request.param
    decoder = engine.describe_decoder(session, manifest, cpu, in_place=in_place)
    engine.warm_up(engine.OnnxBackend(decoder, engine.EngineInfo("onnxruntime", "CPU", 1, {})))
    return engine.Path(session.end_profiling())


def test_a_run_on_the_cpu_is_one_on_the_cpu(profile):
    require_all_on(find_target("CPU", CPU), profile)


def test_a_run_on_the_cpu_is_none_on_cuda(profile):
    with pytest.raises(DeviceError, match=r"nodes do not run on CUDAExecutionProvider: .*\(CPUExecutionProvider\)"):
        require_all_on(find_target("CUDA", EVERYTHING), profile)


def moved(profile, stays):
    """The events, all on CUDA but for the operators that `stays` accepts."""
    events = json.loads(profile.read_text())
    for event in events:
        if event.get("cat") == "Node" and not stays(event["args"]["op_name"]):
            event["args"]["provider"] = "CUDAExecutionProvider"
    return events


def test_one_kind_of_matrix_node_on_the_cpu_is_found(profile):
    operators = {event["args"]["op_name"] for event in json.loads(profile.read_text()) if event.get("cat") == "Node"}
    matrices = {name for name in operators if "MatMul" in name or name == "GroupQueryAttention"}
    assert matrices
    for operator in matrices:
        astray = find_astray(moved(profile, lambda name, left=operator: name == left), "CUDAExecutionProvider")
        assert astray
        assert len(astray) == len(set(astray))
        assert all(name.endswith(" (CPUExecutionProvider)") for name in astray)


def test_shapes_may_be_computed_on_the_cpu(profile):
    events = moved(profile, lambda name: name in ("Shape", "Gather", "Slice", "Concat", "Cast", "Unsqueeze"))
    assert find_astray(events, "CUDAExecutionProvider") == []


def test_an_empty_profile_proves_nothing():
    assert find_astray([], "CUDAExecutionProvider")


def test_a_session_without_its_provider_is_an_error(tiny_onnx):
    """onnxruntime warns and goes on with the CPU when a provider is not there."""
    folder = tiny_onnx("onnx-fp32-plain")
    graph = (folder / "model.onnx").read_bytes()
    target = find_target("CUDA", EVERYTHING)
    with pytest.warns(UserWarning, match="CUDA"), pytest.raises(NormistralError) as caught:
        engine.open_session(graph, engine.session_options({}, folder), target, "x")
    assert "execution-providers" in caught.value.hint
    assert "CUDAExecutionProvider" not in ort.get_available_providers()
