"""An artifact: the folder that an export made, opened once.

An earlier version may have made one wrong, and then it should be exported again. Manifests below schema 6 come from
versions that dropped the fields of config.json which they did not know, and took the rest for the truth of their proof.
transformers 5 writes the angles of positions as such a field (rope_parameters): the artifact then turns by theta 10000,
without scaling, and calls itself verified. The manifest has the SHA-256 of the config.json that was read; where that
very file is still to be found, it decides. Otherwise a preset's published theta does.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from normistral.artifact import store
from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.manifest import MANIFEST_NAME, Manifest, check_files, read_manifest
from normistral.artifact.presets import find_preset
from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import ArtifactError
from normistral.files import replace_undecodable, sha256_file

logger = logging.getLogger(__name__)


class Artifact:
    """Folder, manifest, tokenizer and chat template of an exported model.

    `find` and `open` read the manifest and check the files; tokenizer and chat template are read when they are first
    asked for. Generation defaults are `manifest.sampling`.

    Args:
        folder: as the user means it, relative or absolute.
        manifest: of that folder.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def find(cls, name: str | Path, *, verify: bool = True) -> Artifact:
        """Open the artifact of a path, a name in the local store, or a preset that was exported here.

        Args:
            verify: as in `open`.

        Raises:
            ModelNotFoundError: no such artifact.
            ArtifactError: as `open`.
        """
        return cls.open(store.resolve_artifact(str(name)), verify=verify)

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> Artifact:
        """Open the artifact in a folder.

        Args:
            verify: compare the files with the manifest: SHA-256 of those under 16 MiB, size of the rest.

        Raises:
            ArtifactError: it is damaged, incomplete, or of a newer version.
        """
        artifact = cls(folder, read_manifest(folder))
        if verify:
            artifact.check_files()
        return artifact

    @property
    def name(self) -> str:
        """Name of the folder."""
        return replace_undecodable(self.folder.name)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ArtifactError: it is damaged, or has more tokens than the model.
        """
        tokenizer = Tokenizer.from_folder(self.folder)
        if tokenizer.vocabulary_size > self.manifest.architecture.vocabulary:
            raise ArtifactError(
                f"the tokenizer of {self.name} has {tokenizer.vocabulary_size} tokens, "
                f"the model {self.manifest.architecture.vocabulary}",
                "export the model again",
            )
        return tokenizer

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The compiled chat template; None for a base model.

        Raises:
            TemplateError: it cannot be compiled.
            ArtifactError: as `tokenizer`.
        """
        if self.manifest.template is None:
            return None
        return ChatTemplate(self.manifest.template, self.tokenizer, self.manifest.reasoning)

    def check_files(self) -> None:
        """Compare the files with the manifest as `open` does; raises ArtifactError."""
        check_files(self.folder, self.manifest, thorough=False)

    def manifest_sha256(self) -> str:
        """SHA-256 of the file normistral.json as it is now; key of tuned settings and of stored scores."""
        return sha256_file(self.folder / MANIFEST_NAME)

    def warn_of_advice(self) -> None:
        """Log a warning if an earlier version may have made this artifact wrong."""
        advice = find_advice(self.folder, self.manifest)
        if advice is not None:
            logger.warning("%s: %s", self.name, advice)


_MENDED_SCHEMA = 6
_CONFIG = "config.json"
_DEFAULT_THETA = 10000.0
_MAX_BYTES = 2**20
# Fields that were dropped and change what the model computes, with the values at which they do not.
_DROPPED: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1.0),
    "attention_chunk_size": (None,),
    "logits_scaling": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "is_causal": (None, True),
    "per_layer_config": (None, {}),
}


def find_advice(folder: Path, manifest: Manifest) -> str | None:
    """A sentence for the user, or None where nothing speaks against the artifact.

    Args:
        folder: of the artifact.
    """
    if manifest.schema_version >= _MENDED_SCHEMA or manifest.architecture.positions != "rotary":
        return None
    used = _read(folder / _CONFIG)
    if used is None or _CONFIG not in manifest.source.files:
        return None  # of a .gguf file, whose theta was always read
    source = next(_sources(folder, manifest), None)
    if source is not None:
        wrong = _misread(used, source)
        return None if wrong is None else f"it is not the model of its checkpoint: {wrong}. Export it again"
    if used.get("rope_theta") != _DEFAULT_THETA or used.get("rope_scaling") is not None:
        return None  # read from the form of transformers 4, which was understood
    preset = find_preset(manifest.source.id)
    published = None if preset is None else preset.rope_theta
    if published == _DEFAULT_THETA:
        return None
    if published is not None:
        said = f"but {manifest.source.id} is published with {published:g}"
        return f"it turns positions by theta 10000, {said}. Export it again"
    return (
        "it was made by a version that did not read rope_parameters, in which transformers 5 writes the angles of "
        "positions, and it has theta 10000 without scaling. Its checkpoint was not found here: if that one's "
        "config.json has rope_parameters, export it again"
    )


def _misread(used: dict[str, Any], source: dict[str, Any]) -> str | None:
    """Difference in meaning between the config.json of the artifact and that of the checkpoint; None without one."""
    form = source.get("rope_parameters") or {}
    theta = form.get("rope_theta")
    if theta is not None and theta != used.get("rope_theta"):
        return f"positions are turned by theta {used.get('rope_theta'):g} instead of {theta:g}"
    if form.get("rope_type", "default") != "default" and not used.get("rope_scaling"):
        return f"positions are not scaled, config.json asks for {form['rope_type']}"
    for name, harmless in _DROPPED.items():
        if source.get(name) not in harmless:
            return f"{name} of config.json was dropped"
    return None


def _sources(folder: Path, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """config.json of the checkpoint, where the very file that was read is still there."""
    from normistral.artifact.hub import hub_cache

    source = manifest.source
    places: list[Path] = []
    if source.kind == "hub" and source.revision is not None:
        cache = f"models--{source.id.replace('/', '--')}"
        places = [hub_cache() / cache / "snapshots" / source.revision]
    elif source.kind == "folder" and source.id == Path(source.id).name:
        places = [Path(source.id), folder.absolute().parent / source.id, folder.absolute().parent.parent / source.id]
    for place in places:
        found = _read(place / _CONFIG, source.files[_CONFIG])
        if found is not None:
            yield found


def _read(path: Path, sha256: str | None = None) -> dict[str, Any] | None:
    """A JSON object; None where it cannot be read, or has another hash."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        raw = path.read_bytes()
        document = json.loads(raw)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or (sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256):
        return None
    return document
