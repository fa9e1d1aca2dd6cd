"""Small artifacts for tests: a valid manifest and a few files, no model."""

import dataclasses
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from normistral.artifact.manifest import (
    HASHED_AT_LOAD_BYTES,
    Architecture,
    FileRecord,
    Manifest,
    RecipeRecord,
    SamplingDefaults,
    Source,
    Template,
    hash_files,
    write_manifest,
)

BIG_FILE, BIG_FILE_BYTES = "openvino_model.bin", HASHED_AT_LOAD_BYTES + 1
SMALL_FILE = "config.json"


def make_manifest(**changes: Any) -> Manifest:
    """A chat model's manifest; keyword arguments replace its fields."""
    manifest = Manifest(
        format="openvino",
        created="2026-11-24T00:00:00Z",
        source=Source("hub", "example/model", "0123abcd", {"model.safetensors": "a" * 64}),
        role="chat",
        architecture=Architecture(
            name="MistralForCausalLM",
            model_type="mistral",
            hidden_size=64,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=16,
            feed_forward=128,
            vocabulary=320,
            sliding_window=None,
            tied_embeddings=False,
            parameters=100_000,
        ),
        context_length=128,
        recipe=RecipeRecord("int4", symmetric=True, group_size=64, ratio=1.0, backup="int8_asym", output_layer_bits=8),
        stop_token_ids=(2, 4),
        bos_token_id=1,
        adds_bos=True,
        template=Template("{{ messages }} blåbærsyltetøy", "checkpoint", bos_token="<s>"),
        sampling=SamplingDefaults(temperature=0.3, top_k=64, top_p=0.9),
        files={SMALL_FILE: FileRecord(2, "b" * 64)},
        tools={"openvino": "2026.4.1"},
        quality={"kl": 0.25},
        notes=("gruppestørrelse 64",),
    )
    return dataclasses.replace(manifest, **changes)


def write_artifact(folder: Path, **changes: Any) -> Manifest:
    """A folder with two small files, a sparse one that is too big to be hashed at load, a manifest."""
    folder.mkdir(parents=True)
    (folder / SMALL_FILE).write_text('{"name": "ærlig"}', encoding="utf-8")
    (folder / "tokens.txt").write_text("æ ø å", encoding="utf-8")
    files = hash_files(folder)
    with (folder / BIG_FILE).open("wb") as file:
        file.truncate(BIG_FILE_BYTES)
    manifest = make_manifest(files=files | {BIG_FILE: _zeros()}, **changes)
    write_manifest(folder, manifest)
    return manifest


@cache
def _zeros() -> FileRecord:
    return FileRecord(BIG_FILE_BYTES, hashlib.sha256(bytes(BIG_FILE_BYTES)).hexdigest())
