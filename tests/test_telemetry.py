"""Telemetry of the dependencies stays off: watched from outside, in a fresh process with a fresh home folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Records every address that anything in the process asks a socket to connect to or a resolver to look up.
RECORD_CONNECTIONS = """
import os, sys

def record(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with open(os.environ["CONNECTIONS"], "a") as file:
            print(event, args[1:] if event == "socket.connect" else args, file=file)

sys.addaudithook(record)
"""

CONVERT = """
import normistral
import torch, openvino, nncf
model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 128))
model = openvino.convert_model(model, example_input=torch.zeros(1, 128))
nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64)
try:
    openvino.convert_model("no such file")  # failures are reported too
except Exception:
    pass
import onnxruntime
"""

TURNS_CI_ON = ("CI", "TF_BUILD", "JENKINS_URL", "NNCF_CI", "NNCF_DEV")
SWITCHES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE")


def run_watched(code: str, folder: Path) -> tuple[list[str], str]:
    """Files that `code` left in its home folder, and the connections it tried; in an environment that is no CI."""
    home, site, connections = folder / "home", folder / "site", folder / "connections"
    home.mkdir()
    site.mkdir()
    (site / "sitecustomize.py").write_text(RECORD_CONNECTIONS)
    connections.touch()
    keep = {key: value for key, value in os.environ.items() if key not in (*TURNS_CI_ON, *SWITCHES)}
    keep = {key: value for key, value in keep.items() if not key.startswith(("XDG_", "HF_"))}
    python_path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = keep | {"HOME": str(home), "PYTHONPATH": python_path, "CONNECTIONS": str(connections)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, timeout=300)
    return sorted(str(path.relative_to(home)) for path in home.rglob("*")), connections.read_text()


def test_the_watch_sees_a_connection_and_a_file(tmp_path: Path) -> None:
    code = """
import pathlib, socket
(pathlib.Path.home() / "id").touch()
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
"""
    files, connections = run_watched(code, tmp_path)
    assert files == ["id"]
    assert "127.0.0.1" in connections


@pytest.mark.skipif(sys.platform == "win32", reason="the home folder is set another way there")
def test_converting_and_compressing_leaves_no_trace(tmp_path: Path) -> None:
    assert run_watched(CONVERT, tmp_path) == ([], "")


def test_switches_are_set_whatever_the_user_had(tmp_path: Path) -> None:
    code = "import os, sys, normistral; print(*(os.environ[name] for name in sys.argv[1:]))"
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "0"}
    names = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    done = subprocess.run(
        [sys.executable, "-c", code, *names], env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["1", "1", "1"]
