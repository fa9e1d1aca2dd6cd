"""Sequences to files and back: which file fits which model, and what is checked before an engine sees any of it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normistral.artifact.manifest import serialise_manifest
from normistral.errors import SessionError
from normistral.runtime.arithmetic import describe_arithmetic
from normistral.runtime.session_file import OnBytes, SessionHeader, SessionKey, open_session, write_session

if TYPE_CHECKING:
    from normistral.runtime.model import Model
    from normistral.runtime.sequence import CachedSequence


def session_key(model: Model) -> SessionKey:
    """What this model's sessions belong to."""
    template, capabilities = model.manifest.template, model.capabilities
    return SessionKey(
        artifact_sha256=hashlib.sha256(serialise_manifest(model.manifest)).hexdigest(),
        template_sha256="" if template is None else hashlib.sha256(template.text.encode()).hexdigest(),
        engine=capabilities.name,
        device=re.split(r"[.:]", capabilities.device)[0],
        numerics=capabilities.numerics,
    )


def save_sequence(
    model: Model,
    sequence: CachedSequence,
    path: str | Path,
    on_bytes: OnBytes,
    *,
    kind: Literal["chat", "prefix"],
    **content: Any,
) -> None:
    """Write a sequence's KV cache with what belongs to it: fields of `SessionHeader`.

    Raises:
        UsageError, NormistralError: as `write_session`.
        EngineError: the engine could not read its cache.
        ClosedError: the model was closed.
    """
    model.require_open()
    key = session_key(model)
    with sequence.saving() as saved:
        header = SessionHeader(
            kind=kind,
            key=key,
            artifact=model.name,
            token_ids=saved.token_ids,
            canonical=saved.canonical,
            computed_by=describe_arithmetic(model.capabilities),
            **content,
        )
        write_session(Path(path), header, saved.tensors, on_bytes)


def restore_sequence(
    model: Model, path: str | Path, kind: Literal["chat", "prefix"], on_bytes: OnBytes
) -> tuple[SessionHeader, CachedSequence]:
    """Read what `save_sequence` wrote.

    Raises:
        UsageError, SessionError: as `open_session`; or it is of another kind, artifact, engine or settings.
        EngineError: the engine could not take it over.
        ClosedError: the model was closed.
    """
    path = Path(path)
    with open_session(path, on_bytes) as session:
        session.require(session_key(model), kind)
        header = session.header
        too_large = max(header.token_ids, default=0) >= model.manifest.architecture.vocabulary
        if too_large or len(header.token_ids) > model.context_length:
            raise SessionError(f"{path} holds tokens that {model.name} cannot have", "begin a new one in another file")
        sequence = model.create_sequence()
        try:
            if header.token_ids:
                same = header.computed_by == describe_arithmetic(model.capabilities)
                sequence.restore(header.token_ids, session.tensors(), header.canonical if same else 0)
            else:
                for _ in session.tensors():  # there are none; the file's end is checked all the same
                    raise SessionError(f"{path} is damaged: a cache without tokens", "begin a new one in another file")
        except BaseException:
            sequence.close()
            raise
    return header, sequence
