"""Artifacts exported once for a whole test run, from random checkpoints with the family's quirks."""

import gc
import os
import shutil
import signal
import subprocess
from functools import cache
from pathlib import Path

import pytest
from bundle_files import write_small_artifact, write_wheels
from hypothesis import settings
from shared_folders import make_once
from tiny_models import QUIRKS, make_mistral

from normistral.hardware import read_machine
from normistral.runtime.kernels.compiler import VARIANTS, Variant, file_name
from normistral.runtime.kernels.library import build_library, collect_for_others, find_library, find_obstacle

# The models are so small that torch's threads wait for each other longer than they compute, and there is a process of
# pytest for every processor. Read when torch is first imported; commands that a test starts inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["NORMISTRAL_LANG"] = "en"  # whatever the locale of who runs them

# A shell's background jobs inherit that SIGINT is ignored, and so would every command that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, so that a change is judged by what it changed. To look for new ones:
# pytest --hypothesis-profile=explore
settings.register_profile("explore", max_examples=500, deadline=None)
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


def pytest_collection_finish() -> None:
    """Let no collection of garbage look through the modules that are there by now: half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def few_calibration_tokens():
    """512 tokens, 8 windows of the tiny models' 64 positions, where an export takes 8,192."""
    from normistral.export import resources  # first: it keeps the default for its estimates
    from normistral.export.quantize import plan

    assert resources.CALIBRATION_TOKENS == plan.CALIBRATION_TOKENS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "CALIBRATION_TOKENS", 512)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    return make_mistral(tmp_path_factory.mktemp("checkpoint") / "tiny", **QUIRKS)


@pytest.fixture(scope="session")
def tiny_fp16(tiny_checkpoint, tmp_path_factory) -> Path:
    from normistral import export_model

    def export(output: Path) -> None:
        export_model(str(tiny_checkpoint), output, weights="fp16")

    return make_once(tmp_path_factory, "tiny-openvino-fp16", export)


@pytest.fixture(scope="session")
def tiny_int4(tiny_checkpoint, tmp_path_factory) -> Path:
    """Groups of 32, rounded to nearest; OpenVINO, not verified."""
    from normistral import export_model

    def export(output: Path) -> None:
        export_model(str(tiny_checkpoint), output, weights="int4", group_size=32, recipe="fast", verify=False)

    return make_once(tmp_path_factory, "tiny-openvino-int4", export)


@pytest.fixture(scope="session")
def demo_int4(tmp_path_factory) -> Path:
    """The demo model, rounded to nearest: its default takes a minute more."""
    from normistral import export_model

    def export(output: Path) -> None:
        export_model("demo", output, weights="int4", recipe="fast")

    return make_once(tmp_path_factory, "demo-openvino-int4", export)


# The ways to store one checkpoint: name -> options of `export_model`.
ONNX_EXPORTS = {
    "onnx-fp32-plain": {"weights": "fp32", "graph": "plain"},
    "onnx-fp32-fused": {"weights": "fp32", "graph": "fused"},
    "onnx-fp16-plain": {"weights": "fp16", "graph": "plain"},
    "onnx-fp16-fused": {"weights": "fp16", "graph": "fused"},
    "onnx-int8": {"weights": "int8"},
    "onnx-int4": {"weights": "int4", "group_size": 32, "recipe": "fast"},
    "onnx-int4-asymmetric": {"weights": "int4", "group_size": 32, "symmetric": False, "recipe": "fast"},
}


@pytest.fixture(scope="session")
def tiny_onnx(tiny_checkpoint, tmp_path_factory):
    """name -> the artifact of the tiny checkpoint; each is made when it is first asked for."""
    from normistral import export_model

    @cache
    def export(name: str) -> Path:
        def export_named(output: Path) -> None:
            export_model(str(tiny_checkpoint), output, format="onnx", **ONNX_EXPORTS[name])

        return make_once(tmp_path_factory, f"tiny-{name}", export_named)

    return export


@pytest.fixture(scope="session")
def compiled_home(tmp_path_factory) -> Path:
    """A store with the int4 kernel for this machine in it."""
    if find_obstacle(read_machine()) is not None or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs a processor with AVX2, and a C++ compiler")

    def build(home: Path) -> None:
        home.mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NORMISTRAL_HOME", str(home))
            build_library(read_machine())

    return make_once(tmp_path_factory, "home", build)


@pytest.fixture(scope="session")
def every_kernel(tmp_path_factory) -> dict[Variant, Path]:
    """The int4 kernel for every processor: the package's own where it was made of these sources, or compiled (13 s)."""

    def build(folder: Path) -> None:
        folder.mkdir(parents=True)
        for path in collect_for_others(folder):
            if path.parent != folder:
                shutil.copy(path, folder)

    folder = make_once(tmp_path_factory, "kernels", build)
    return {variant: folder / file_name(variant) for variant in VARIANTS}


@pytest.fixture
def no_packaged_kernel(tmp_path, monkeypatch) -> None:
    """The package as it is installed where nothing was compiled into it."""
    monkeypatch.setattr("normistral.runtime.kernels.library.PACKAGED", tmp_path / "not-compiled")


@pytest.fixture
def int4_library(compiled_home, no_packaged_kernel, monkeypatch) -> Path | None:
    """The compiled kernel in a store; what the test loads finds it too."""
    monkeypatch.setenv("NORMISTRAL_HOME", str(compiled_home))
    return find_library(read_machine())


@pytest.fixture(scope="session")
def bundle_wheels(tmp_path_factory) -> Path:
    return write_wheels(tmp_path_factory.mktemp("wheels") / "folder")


@pytest.fixture(scope="session")
def signing_key(tmp_path_factory) -> Path:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("needs ssh-keygen, of OpenSSH's client")
    key = tmp_path_factory.mktemp("keys") / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    return key


@pytest.fixture(scope="session")
def signed_bundle(bundle_wheels, signing_key, tmp_path_factory) -> Path:
    """A bundle of an artifact without a model, its signature, and beside it `signers`."""
    from normistral.bundle.pack import BundleOptions, make_bundle
    from normistral.bundle.wheels import choose_target

    folder = tmp_path_factory.mktemp("bundles")
    artifact = write_small_artifact(folder / "liten")
    make_bundle(artifact, folder / "liten.tar", BundleOptions(choose_target(), key=signing_key, wheels=bundle_wheels))
    public = signing_key.with_suffix(".pub").read_text()
    (folder / "signers").write_text(f'utgiver@example.no namespaces="normistral-bundle" {public}')
    return folder / "liten.tar"
