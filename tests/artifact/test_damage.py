"""Damage to real artifacts: whatever bit is changed, it is found, and nothing ends in a traceback."""

import random
import shutil

import pytest

import normistral
from normistral.artifact.extra_files import CARD_NAME, is_sealed
from normistral.artifact.manifest import find_problems, read_manifest
from normistral.errors import ArtifactError, NormistralError

FLIPS = {"openvino": 1000, "onnx": 300}
DAMAGED = {
    "openvino": ("openvino_model.bin", "openvino_model.xml", "tokenizer.json", "config.json"),
    "onnx": ("model.onnx.data", "model.onnx", "genai_config.json", "tokenizer.json"),
}


@pytest.fixture(scope="module")
def artifacts(tiny_fp16, tiny_onnx, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    exported = {"openvino": tiny_fp16, "onnx": tiny_onnx("onnx-int4")}
    return {format: shutil.copytree(artifact, folder / format) for format, artifact in exported.items()}


@pytest.fixture(params=DAMAGED)
def artifact(request, artifacts):
    return artifacts[request.param]


def is_found(folder) -> bool:
    """What `info --check` does; the card is no part of the artifact, but one that was changed is known."""
    if not is_sealed((folder / CARD_NAME).read_bytes()):
        return True
    try:
        return any(True for _ in find_problems(folder, read_manifest(folder), thorough=True))
    except ArtifactError:
        return True


def test_the_undamaged_artifact_is_fine(artifact):
    assert not is_found(artifact)


def test_every_bit_flip_is_found(artifact):
    # Half of the flips fall anywhere, in proportion to size; the others into each file alike, so that small files
    # and the manifest get their share.
    chance = random.Random(1)
    files = sorted(artifact.iterdir())
    sizes = [file.stat().st_size for file in files]
    missed = []
    for number in range(FLIPS[read_manifest(artifact).format]):
        file = chance.choices(files, sizes)[0] if number % 2 else files[number // 2 % len(files)]
        position, bit = chance.randrange(file.stat().st_size), chance.randrange(8)
        with file.open("r+b") as damaged:
            damaged.seek(position)
            byte = damaged.read(1)
            damaged.seek(position)
            damaged.write(bytes([byte[0] ^ 1 << bit]))
        if not is_found(artifact):
            missed.append((file.name, position, bit))
        with file.open("r+b") as damaged:
            damaged.seek(position)
            damaged.write(byte)
    assert missed == []
    assert not is_found(artifact)


@pytest.mark.parametrize(("format", "name"), [(format, name) for format in DAMAGED for name in DAMAGED[format]])
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "a link"])
def test_load_refuses_a_damaged_artifact(artifacts, tmp_path, format, name, damage):
    artifact = artifacts[format]
    folder = shutil.copytree(artifact, tmp_path / "artifact")
    file = folder / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        file.unlink()
        file.symlink_to(artifact / name)
    with pytest.raises(NormistralError, match=name) as caught:
        normistral.load(folder)
    assert caught.value.hint


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match=r"normistral\.json") as caught:
        normistral.load(tmp_path)
    assert "normistral export" in caught.value.hint
