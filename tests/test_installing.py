"""How a checkout is installed: which Python, which PyTorch, how much, and what is said of it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


installing = load_script("install")


def make_environment(folder, pythons):
    """`make .venv/.created` where PATH has only these Pythons: name -> its version, and the exit status of `-c`."""
    tools = folder / "bin"
    tools.mkdir()
    for tool in ("sh", "sed", "expr", "seq", "echo", "touch"):
        found = next(path for path in (Path("/bin", tool), Path("/usr/bin", tool)) if path.exists())
        (tools / tool).symlink_to(found)
    for name, (version, modules) in pythons.items():
        script = f"""#!{sys.executable} -S
import sys
version = {version}
modules = {modules}
if sys.argv[1] == "--version":
    print("Python", ".".join(map(str, version)))
elif sys.argv[1] == "-c":
    class Info(tuple): pass
    sys.version_info = version
    for module in ("ensurepip", "venv"):
        if module in sys.argv[2] and not modules:
            sys.exit("no module " + module)
    exec(sys.argv[2].replace("import ensurepip, venv; ", ""))
else:
    print("made by", {name!r}, file=sys.stderr)
"""
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    make = next(path for path in (Path("/usr/bin/make"), Path("/bin/make")) if path.exists())
    environment = {"PATH": str(tools), "HOME": str(folder)}
    venv = folder / "venv"
    venv.mkdir()
    command = [make, "--no-print-directory", f"{venv}/.created", f"VENV={venv}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("version", [(3, 11, 2), (3, 12, 0), (3, 13, 5), (3, 14, 8)])
def test_every_python_of_the_range_makes_the_environment(tmp_path, version):
    assert make_environment(tmp_path, {"python3": (version, True)}) == (0, "made by python3\n")


def test_a_suitable_python_beside_an_unsuitable_one_is_found(tmp_path):
    pythons = {"python3": ((3, 15, 0), True), "python3.12": ((3, 12, 1), True)}
    assert make_environment(tmp_path, pythons) == (0, "made by python3.12\n")


@pytest.mark.parametrize(
    ("version", "modules", "says"),
    [
        ((3, 15, 0), True, "OpenVINO and onnxruntime have no wheels for it yet"),
        ((3, 15, 0), True, 'uv python install 3.14 && make chat PYTHON="$(uv python find 3.14)"'),
        ((3, 9, 2), True, "install a newer one"),
        ((3, 13, 5), False, "apt install python3-venv"),
    ],
)
def test_a_system_without_a_suitable_python_is_told_why_and_what_to_do(tmp_path, version, modules, says):
    status, said = make_environment(tmp_path, {"python3": (version, modules)})
    assert status == 2
    shown = ".".join(map(str, version))
    assert said.startswith(f"error: normistral needs Python 3.11 to 3.14 with venv; python3 is Python {shown}\nhint: ")
    assert says in said


SIDE_ENVIRONMENTS = re.findall(
    r"(?m)(?:^| )(\.venv-[\w-]+/\.ready)(?=[ :](?!.*=))", (ROOT / "Makefile").read_text("utf-8")
)


@pytest.mark.parametrize("target", sorted(set(SIDE_ENVIRONMENTS)))
def test_an_environment_beside_gets_its_packages_whole(tmp_path, target):
    """A requirement has characters that a shell would take as its own: [ ] < >."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    python = tmp_path / "tools" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"""#!{sys.executable} -S
import os, shutil, sys
with open({str(tmp_path / "asked")!r}, "a") as asked:
    print(*sys.argv[1:], sep="\\0", file=asked)
if sys.argv[1:3] == ["-m", "venv"]:
    os.makedirs(sys.argv[3] + "/bin")
    shutil.copy(__file__, sys.argv[3] + "/bin/python")
elif sys.argv[1] == "-c":
    print(os.path.dirname(__file__))
""")
    python.chmod(0o755)
    (python.parents[1] / ".created").touch()
    done = subprocess.run(
        ["make", "--no-print-directory", target, "VENV=tools"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    asked = [line.split("\0") for line in (tmp_path / "asked").read_text().splitlines()]
    (install,) = (words[4:] for words in asked if words[:4] == ["-m", "pip", "install", "--quiet"])
    for requirement in map(Requirement, install):
        assert requirement.specifier, requirement
    left = {path.name for path in tmp_path.iterdir()} - {"Makefile", "pyproject.toml", "tools", "asked"}
    assert left == {Path(target).parent.name}


def test_requirements_are_those_of_the_project_file():
    found = installing.read_requirements(["dev"])
    assert any(requirement.startswith("setuptools") for requirement in found)  # the build's, which is not isolated
    for name in ("openvino==", "torch==", "onnxruntime==", "fastapi", "pytest>"):
        assert any(requirement.startswith(name) for requirement in found), name
    assert not any(requirement.startswith("normistral") for requirement in found)


def write_torch(folder, version):
    """A wheel of the name, in a folder that serves as an index."""
    wheel = folder / "torch" / f"torch-{version}-py3-none-any.whl"
    wheel.parent.mkdir(parents=True, exist_ok=True)
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index of PyTorch's builds on this machine; pip has no configuration, and no other index."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "index"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *arguments: None)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(installing, "_installed", lambda name: "")
    monkeypatch.setattr(installing.platform, "system", lambda: "Linux")
    monkeypatch.setattr(installing.platform, "machine", lambda: "x86_64")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_cpu_build_is_taken_from_its_index_by_itself(index, tmp_path, monkeypatch, capsys):
    wheel = write_torch(tmp_path / "index", "99.1+cpu")
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    monkeypatch.setattr(installing, "CPU_TORCH", index)
    line = installing.Line()
    requirement, options = installing.choose_torch("torch==99.1", line)
    assert (requirement, options) == ("torch==99.1+cpu", ["--extra-index-url", index])
    (file,) = installing.plan(["--no-deps", "--index-url", index, requirement], line)
    assert file == ("torch", "99.1+cpu", wheel.stat().st_size)
    assert capsys.readouterr().err == ""


def test_where_the_index_cannot_be_reached_the_build_of_pypi_comes_and_is_said(index, monkeypatch, capsys):
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    monkeypatch.setattr(installing, "CPU_TORCH", "http://127.0.0.1:9")
    assert installing.choose_torch("torch==99.1", installing.Line()) == ("torch==99.1", [])
    assert "3 GB more to" in capsys.readouterr().err


def test_an_index_that_was_named_and_does_not_have_it_is_an_error(index, tmp_path, monkeypatch):
    write_torch(tmp_path / "index", "98.0+cpu")
    monkeypatch.setenv("TORCH_INDEX", index)
    with pytest.raises(installing.InstallationError, match=r"has no torch==99\.1"):
        installing.choose_torch("torch==99.1", installing.Line())


def test_the_moving_line_follows_what_pip_prints():
    told = installing.Downloads(total=300_000_000, count=2)
    said = [
        told.read(text)
        for text in (
            "Collecting torch==2.13.0\n",
            "  Downloading https://example.org/torch-2.13.0-cp313-cp313-manylinux_2_28_x86_64.whl (200.0 MB)\n",
            "Progress 50000000 of 200000000\n",
            "",
            "Progress 200000000 of 200000000\n",
            "Downloading numpy-2.4.6-cp313-cp313-manylinux_2_28_x86_64.whl (100.0 MB)\n",
            "Progress 10000000 of 100000000\n",
            "Installing collected packages: numpy, torch\n",
            "",
        )
    ]
    assert said[2] == said[3] == "downloading torch, 50 MB of 300 MB"
    assert said[6] == "downloading numpy, 210 MB of 300 MB"
    assert said[-1] == "installing 2 packages"
