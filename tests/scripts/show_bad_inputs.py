"""Run the command line on every kind of bad input and print what it says.

    python tests/scripts/show_bad_inputs.py [--runtime-only-python PYTHON]

Each must end with exit code 1 or 2, with one `error:` and one `hint:` line last, without a traceback, and leave nothing
behind. With --runtime-only-python (an environment without the extra) exporting without it is tried as well. The full
disk needs to be root, for a small tmpfs. Exits with 1 at the end if any case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from tiny_models import VOCABULARY, edit_json, make_mistral, write_tokenizer

from normistral.artifact.manifest import SCHEMA_VERSION, parse_manifest, read_manifest, serialise_manifest
from normistral.export.checkpoint.families import find_family, sanitise_config

Command = list[str]


def bad_checkpoints(root: Path) -> dict[str, Command]:
    """Name of the case -> arguments, for models that cannot be exported."""

    def model(name: str, damage: Callable[[Path], object], **options: object) -> Command:
        folder = make_mistral(root / name, shards=2, **options)
        damage(folder)
        return ["export", str(folder), str(root / "out")]

    first = "model-00001-of-00002.safetensors"
    (root / "empty").mkdir()
    return {
        "no such model": ["export", "nosuchmodel", str(root / "out")],
        "a folder without config.json": ["export", str(root / "empty"), str(root / "out")],
        "an unsupported architecture": model(
            "bloom", lambda folder: edit_json(folder / "config.json", architectures=["BloomModel"], model_type="bloom")
        ),
        "a truncated shard": model("truncated", lambda folder: os.truncate(folder / first, 5000)),
        "a corrupt shard": model("corrupt", lambda folder: (folder / first).write_bytes(b"\xff" * 50_000)),
        "a missing shard": model("missing", lambda folder: (folder / first).unlink()),
        "a tokenizer that does not fit": model(
            "tokenizer", lambda folder: write_tokenizer(folder, VOCABULARY + 9, chat=True, adds_bos=False)
        ),
        "ONNX without groups": [
            "export",
            str(root / "empty"),
            str(root / "out"),
            "--format",
            "onnx",
            "--group-size",
            "-1",
        ],
        "a plain graph of int4": [
            "export",
            str(root / "empty"),
            str(root / "out"),
            "--format",
            "onnx",
            "--graph",
            "plain",
        ],
        "fp32 in OpenVINO": ["export", str(root / "empty"), str(root / "out"), "--weights", "fp32"],
        "a context that is too short": ["export", str(root / "empty"), str(root / "out"), "--context", "3"],
        "heads that the fused graph cannot turn": [
            *model("heads", lambda folder: None, head_dim=24),
            *("--format", "onnx", "--group-size", "32"),
        ],
        "a wrong option": ["export", str(root / "empty"), str(root / "out"), "--group-size", "48"],
        "a config that names code": model(
            "code", lambda folder: edit_json(folder / "config.json", hidden_size="64; import os", auto_map={"a": "b.c"})
        ),
        "too little memory": ["export", str(make_huge_checkpoint(root / "huge")), str(root / "out")],
    }


def make_huge_checkpoint(folder: Path) -> Path:
    """NorMistral's 7B shape with 240 layers, 105 GB, as one sparse file that takes no disk."""
    make_mistral(folder)
    (folder / "model.safetensors").unlink()
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 240, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "head_dim": 128}
    edit_json(folder / "config.json", torch_dtype="bfloat16", **shape)
    config = sanitise_config(json.loads((folder / "config.json").read_text()))
    header, position = {}, 0
    for name, dimensions in find_family(config).tensor_shapes(config).items():
        size = 2
        for dimension in dimensions:
            size *= dimension
        header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + position)
    return folder


def bad_artifacts(root: Path, artifact: Path) -> dict[str, Command]:
    """Name of the case -> arguments, for artifacts that are damaged and runs that are impossible."""

    def damaged(name: str, damage: Callable[[Path], object]) -> str:
        folder = shutil.copytree(artifact, root / name)
        damage(folder)
        return str(folder)

    def make_newer(folder: Path) -> None:
        raw = (folder / "normistral.json").read_bytes()
        assert parse_manifest(raw)
        (folder / "normistral.json").write_bytes(
            raw.replace(*(b'"schema_version": %d' % (SCHEMA_VERSION + i) for i in (0, 1)))
        )

    def grow(folder: Path) -> None:
        """A large file whose size is right and whose content is not: only --check sees that."""
        big = folder / "openvino_model.bin"
        manifest = read_manifest(folder)
        record = type(manifest.files[big.name])(20 * 2**20, "0" * 64)
        files = {**manifest.files, big.name: record}
        changed = type(manifest)(**{**{f: getattr(manifest, f) for f in manifest.__slots__}, "files": files})
        os.truncate(big, record.size)
        (folder / "normistral.json").write_bytes(serialise_manifest(changed))

    hello = ["--prompt", "Hei"]
    chat = ["chat", str(artifact)]
    return {
        "no such artifact": ["chat", "nosuchartifact", *hello],
        "an artifact with a missing file": ["chat", damaged("a", lambda f: (f / "tokenizer.json").unlink()), *hello],
        "an artifact with a truncated file": [
            "chat",
            damaged("b", lambda f: os.truncate(f / "openvino_model.bin", 1000)),
            *hello,
        ],
        "an artifact with a changed file": [
            "chat",
            damaged("c", lambda f: (f / "config.json").write_bytes((f / "config.json").read_bytes()[:-1] + b" ")),
            *hello,
        ],
        "a changed large file (info --check)": ["info", damaged("d", grow), "--check"],
        "an artifact of a newer schema": ["info", damaged("e", make_newer)],
        "OUTPUT exists": ["export", "demo", str(artifact)],
        "an empty prompt": [*chat, "--prompt", ""],
        "a context that is too long": [*chat, "--prompt", "lang " * 100],
        "an unknown device": [*chat, *hello, "--device", "GPU"],
        "an unknown option": [*chat, "--nosuchoption"],
        "a wrong value": [*chat, *hello, "--temperature", "-1"],
    }


def bad_onnx_artifacts(root: Path, artifact: Path) -> dict[str, Command]:
    """As `bad_artifacts`, for what is different in ONNX."""
    hello = ["--prompt", "Hei"]

    def damaged(name: str, damage: Callable[[Path], object]) -> Command:
        folder = shutil.copytree(artifact, root / f"onnx-{name}")
        damage(folder)
        return ["chat", str(folder), *hello]

    def flip(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    chat = ["chat", str(artifact), *hello]
    return {
        "ONNX: weights are missing": damaged("missing", lambda f: (f / "model.onnx.data").unlink()),
        "ONNX: truncated weights": damaged("truncated", lambda f: os.truncate(f / "model.onnx.data", 1000)),
        "ONNX: changed weights": damaged("weights", lambda f: flip(f / "model.onnx.data")),
        "ONNX: a changed graph": damaged("graph", lambda f: flip(f / "model.onnx")),
        "ONNX: a truncated graph": damaged("half", lambda f: os.truncate(f / "model.onnx", 1000)),
        "ONNX: a provider that is not installed": [*chat, "--device", "CUDA"],
        "ONNX: a device of OpenVINO": [*chat, "--device", "GPU"],
        "ONNX: a device that nobody has": [*chat, "--device", "TOASTER:1"],
    }


def run(name: str, arguments: Command, python: str = sys.executable) -> bool:
    """Run one case, print it; whether it ended as it must."""
    done = subprocess.run(
        [python, "-m", "normistral", *arguments], capture_output=True, encoding="utf-8", stdin=subprocess.DEVNULL
    )
    lines = done.stderr.splitlines()
    fine = (
        done.returncode in (1, 2)
        and len(lines) >= 2
        and lines[-2].startswith("error: ")
        and lines[-1].startswith("hint: ")
        and sum(line.startswith(("error:", "hint:")) for line in lines) == 2
        and "Traceback" not in done.stderr + done.stdout
    )
    print(f"{'ok  ' if fine else 'FAIL'} {name}: exit {done.returncode}")
    for line in lines[-2:] if fine else lines:
        print(f"       {line}")
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtime-only-python")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        os.environ["NORMISTRAL_HOME"] = str(root / "home")
        artifact = root / "artifact"
        good = make_mistral(root / "good")
        subprocess.run([sys.executable, "-m", "normistral", "export", str(good), str(artifact)], check=True)
        onnx = root / "onnx"
        export = [
            sys.executable,
            "-m",
            "normistral",
            "export",
            str(make_mistral(root / "even", head_dim=32)),
            str(onnx),
        ]
        subprocess.run([*export, "--format", "onnx"], check=True)
        results = [run(name, arguments) for name, arguments in bad_checkpoints(root).items()]
        results += [run(name, arguments) for name, arguments in bad_artifacts(root, artifact).items()]
        results += [run(name, arguments) for name, arguments in bad_onnx_artifacts(root, onnx).items()]
        if os.geteuid() == 0:
            disk = root / "disk"
            disk.mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
            if subprocess.run(mount, check=False).returncode == 0:
                results.append(run("a full disk", ["export", str(good), str(disk / "out")]))
                results.append(not any(disk.iterdir()))
                subprocess.run(["umount", str(disk)], check=True)
        if options.runtime_only_python:
            arguments = ["export", str(good), str(root / "out")]
            results.append(run("the extra is not installed", arguments, options.runtime_only_python))
        left = [path.name for path in root.iterdir() if path.name == "out" or path.name.startswith(".out")]
        print(f"{sum(results)} of {len(results)} as they must be; left behind: {left or 'nothing'}")
        return int(not all(results) or bool(left))


if __name__ == "__main__":
    sys.exit(main())
