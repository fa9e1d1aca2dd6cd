"""An artifact: the folder that an export made, opened once."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path

from normistral.artifact import store
from normistral.artifact.advisory import find_advice
from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.manifest import MANIFEST_NAME, Manifest, check_files, read_manifest
from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import ArtifactError
from normistral.files import sha256_file

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
        return self.folder.name

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
