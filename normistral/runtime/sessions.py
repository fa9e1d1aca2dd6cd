"""Saves and restores sequences; a file is checked against the model before an engine reads from it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal

from normistral.errors import SessionError
from normistral.progress import OnBytes
from normistral.runtime.engines.base import describe_arithmetic
from normistral.runtime.runner import Runner
from normistral.runtime.sequence import CachedSequence
from normistral.runtime.session_file import SessionHeader, SessionKey, open_session, write_session


def session_key(runner: Runner) -> SessionKey:
    """Artifact, engine and settings under which sessions of these weights are good."""
    template, capabilities = runner.manifest.template, runner.capabilities
    return SessionKey(
        artifact_sha256=runner.manifest.sha256,
        template_sha256="" if template is None else hashlib.sha256(template.text.encode()).hexdigest(),
        engine=capabilities.name,
        device=re.split(r"[.:]", capabilities.device)[0],
        numerics=capabilities.kv_cache_key,
    )


def save_sequence(
    runner: Runner,
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
    runner.require_open()
    key = session_key(runner)
    with sequence.saving() as saved:
        header = SessionHeader(
            kind=kind,
            key=key,
            artifact=runner.name,
            token_ids=saved.token_ids,
            canonical=saved.canonical,
            computed_by=describe_arithmetic(runner.capabilities),
            **content,
        )
        write_session(Path(path), header, saved.tensors, on_bytes)


def restore_sequence(
    runner: Runner, path: str | Path, kind: Literal["chat", "prefix"], on_bytes: OnBytes
) -> tuple[SessionHeader, CachedSequence]:
    """Read a session that `save_sequence` wrote.

    Raises:
        UsageError, SessionError: as `open_session`; or it is of another kind, artifact, engine or settings.
        EngineError: the engine could not take it over.
        ClosedError: the model was closed.
    """
    path = Path(path)
    with open_session(path, on_bytes) as session:
        session.require(session_key(runner), kind)
        header = session.header
        too_large = max(header.token_ids, default=0) >= runner.manifest.architecture.vocabulary
        if too_large or len(header.token_ids) > runner.context_length:
            raise SessionError(f"{path} holds tokens that {runner.name} cannot have", "begin a new one in another file")
        sequence = runner.create_sequence()
        try:
            if header.token_ids:
                same = header.computed_by == describe_arithmetic(runner.capabilities)
                sequence.restore(header.token_ids, session.tensors(), header.canonical if same else 0)
            else:
                for _ in session.tensors():  # there are none; the file's end is checked all the same
                    raise SessionError(f"{path} is damaged: a cache without tokens", "begin a new one in another file")
        except BaseException:
            sequence.close()
            raise
    return header, sequence
