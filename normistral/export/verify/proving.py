"""What becomes of an artifact's proof: it goes into the manifest, and what fails is kept only if asked for."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from normistral.artifact.manifest import Manifest, Verified, write_manifest
from normistral.errors import ExportError, UsageError
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.reference.model import Reference
from normistral.export.staging import Staging
from normistral.export.verify.artifact import verify
from normistral.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Proving:
    """Whether the artifact is verified, and where one that fails is kept; None is nowhere."""

    verify: bool
    keep_failed: Path | None


def choose_proving(output: Path, *, verify: bool, keep_failed: bool) -> Proving:
    """Check the user's choice.

    Raises:
        UsageError: nothing can fail without verification, or something stands where it would be kept.
    """
    if not keep_failed:
        return Proving(verify, None)
    if not verify:
        raise UsageError("without verification nothing fails that could be kept", "leave out --keep-failed")
    place = output.absolute().with_name(f"{output.name}.failed")
    if os.path.lexists(place):
        raise UsageError(f"{place} exists already", "remove or rename it, or leave out --keep-failed")
    return Proving(verify, place)


def prove(
    manifest: Manifest,
    checkpoint: Checkpoint,
    token_ids: list[int],
    reference: Reference | None,
    staging: Staging,
    proving: Proving,
    progress: Progress,
) -> Manifest:
    """The manifest with what was proved. What fails is kept under `proving.keep_failed`, if that is a path."""
    if not proving.verify:
        progress.note("not verified: --no-verify")
        return replace(manifest, verified="no", notes=(*manifest.notes, "not verified, as asked"))
    try:
        proof = verify(staging.artifact, manifest, checkpoint, token_ids, reference, progress)
    except ExportError as failure:
        if proving.keep_failed is not None:
            notes = (*manifest.notes, f"failed its verification: {failure.message}")
            write_manifest(staging.artifact, replace(manifest, verified="failed", notes=notes))
            staging.artifact.rename(proving.keep_failed)
            failure.hint = f"what was written is kept as {proving.keep_failed}; {failure.hint}"
        raise
    progress.note(proof.summary)
    logger.info(proof.note)
    verified: Verified = "run" if proof.has_run else "read"
    return replace(manifest, verified=verified, quality=proof.quality, notes=(*manifest.notes, proof.note))
