"""Small bundles: an artifact without a model, and wheels that do next to nothing."""

import base64
import ensurepip
import hashlib
import shutil
import sysconfig
import zipfile
from pathlib import Path

from sample_artifacts import make_manifest

import normistral
from normistral.artifact.manifest import hash_files, write_manifest

FAKE_NORMISTRAL = """
import sys

def main():
    import leaf
    print(leaf.NAME, *sys.argv[1:])
"""


def write_wheel(
    folder: Path, name: str, version: str, code: str, requires: tuple[str, ...] = (), *headers: str
) -> Path:
    """A wheel with one module and, if that has a `main`, a command, both named after it."""
    info = f"{name}-{version}.dist-info"
    metadata = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *headers]
    metadata += [f"Requires-Dist: {line}" for line in requires]
    contents = {
        f"{name}.py": code,
        f"{info}/METADATA": "\n".join([*metadata, ""]),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if "def main" in code:
        contents[f"{info}/entry_points.txt"] = f"[console_scripts]\n{name} = {name}:main\n"
    sums = {path: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()) for path, text in contents.items()}
    lines = [f"{path},sha256={sums[path].rstrip(b'=').decode()},{len(contents[path].encode())}\n" for path in contents]
    contents[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"])
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
    return wheel


def write_wheels(folder: Path) -> Path:
    """A normistral that only echoes, what it requires, and this Python's pip."""
    folder.mkdir(parents=True)
    extras = ("Provides-Extra: onnx", "Provides-Extra: serve")
    requires = ("leaf>=1", 'onnxruntime; extra == "onnx"', 'absent; sys_platform == "win32"')
    write_wheel(
        folder,
        "normistral",
        normistral.__version__,
        FAKE_NORMISTRAL,
        requires,
        "License-Expression: Apache-2.0",
        *extras,
    )
    write_wheel(folder, "leaf", "1.2", "NAME = 'blåbær'", (), "License: MIT")
    write_wheel(folder, "onnxruntime", "1.0", "", (), "Classifier: License :: OSI Approved :: MIT License")
    write_wheel(folder, "unneeded", "1.0", "")
    shutil.copy(find_pip(), folder)
    return folder


def find_pip() -> Path:
    """The wheel that `python -m venv` installs; Debian keeps it elsewhere than in ensurepip."""
    folders = [Path(ensurepip.__file__).parent / "_bundled", Path(sysconfig.get_config_var("WHEEL_PKG_DIR") or "")]
    return next(wheel for folder in folders for wheel in folder.glob("pip-*.whl"))


def write_small_artifact(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"name": "ærlig"}', encoding="utf-8")
    (folder / "model.bin").write_bytes(bytes(range(256)) * 5)
    write_manifest(folder, make_manifest(files=hash_files(folder), **changes))
    return folder
