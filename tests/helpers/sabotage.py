"""Exports that are tampered with between writing and verifying, and where matrices lie in an artifact's data file."""

from __future__ import annotations

import re
from pathlib import Path

import onnx

import normistral
from normistral.export.verify import artifact as verification


def export(checkpoint, output, format, sabotage=None, patch=None, **options):
    """Export; `sabotage(folder, manifest)` comes between writing and verifying, and may return another manifest."""
    real = verification.verify_artifact

    def verify_artifact(job, manifest):
        changed = None if sabotage is None else sabotage(job.staging.artifact, manifest)
        return real(job, changed or manifest)

    if patch is not None:
        patch.setattr(verification, "verify_artifact", verify_artifact)
    options = {"weights": "int4", "group_size": 32} | options
    if options["weights"] == "int4":
        options.setdefault("recipe", "fast")
    return normistral.export_model(str(checkpoint), output, format=format, **options)


def constants(folder: Path, pattern: str) -> list[tuple[int, int]]:
    """Offset and size in openvino_model.bin of the constants whose names match."""
    text = (folder / "openvino_model.xml").read_text(encoding="utf-8")
    layers = re.findall(r'<layer id="\d+" name="([^"]*)" type="Const"[^>]*>\s*<data ([^>]*)/>', text)
    places = []
    for name, data in layers:
        if re.fullmatch(pattern, name):
            fields = dict(re.findall(r'(\w+)="([^"]*)"', data))
            places.append((int(fields["offset"]), int(fields["size"])))
    return places


def tensors(folder: Path, *names: str) -> list[tuple[int, int]]:
    """Offset and length in model.onnx.data of some initializers."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    where = {t.name: {entry.key: entry.value for entry in t.external_data} for t in graph.initializer}
    return [(int(where[name]["offset"]), int(where[name]["length"])) for name in names]


def data_file(folder: Path) -> Path:
    return folder / ("model.onnx.data" if (folder / "model.onnx").exists() else "openvino_model.bin")


def read_at(folder: Path, place: tuple[int, int]) -> bytes:
    return data_file(folder).read_bytes()[place[0] : sum(place)]


def write_at(folder: Path, place: tuple[int, int], content: bytes) -> None:
    assert len(content) == place[1]
    with data_file(folder).open("r+b") as file:
        file.seek(place[0])
        file.write(content)


def places_of(folder: Path, matrix: str, part: str) -> tuple[int, int]:
    """Where codes or scales of a matrix lie, in either format."""
    if (folder / "model.onnx").exists():
        return tensors(folder, f"{matrix}.weight.{part}")[0]
    suffix = "" if part == "codes" else "/scale"
    (place,) = constants(folder, rf"self\.{re.escape(matrix)}\.(weight|_openvino_orig_weight){suffix}")
    return place
