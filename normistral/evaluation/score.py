"""An evaluation as a story: the reference's predictions go to disk, then the artifact's are compared with them.

The two are never in memory together. It knows a reference by its predictions alone: what makes them may be another
artifact, or a checkpoint that `normistral.export` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest
from normistral.artifact.tokenizer import TOKENIZER_NAME, Tokenizer
from normistral.errors import EngineError, UsageError
from normistral.evaluation.metrics import TokenScores, kl_divergences, token_nll
from normistral.evaluation.reference_logits import ReferenceFile, ReferenceKey
from normistral.evaluation.text import Text, tokenise
from normistral.evaluation.windows import Window, WindowSettings
from normistral.files import sha256_file
from normistral.runtime.engines.base import Logits
from normistral.runtime.model import Model


class Predictor(Protocol):
    """Anything that predicts the scored tokens of windows."""

    def predict(self, windows: Sequence[Window]) -> Iterator[Logits]:
        """Float32 [scored, vocabulary] for each window, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class Reference:
    """A model to compare with, not loaded yet.

    Attributes:
        name: for people.
        source: what it is, and the hash of its files.
        folder: holds its tokenizer.json.
        vocabulary: width of its logits.
        context_length: in tokens; None for a model that knows no limit.
        open: loads it; closing the context frees it.
    """

    name: str
    source: str
    folder: Path
    vocabulary: int
    context_length: int | None
    open: Callable[[], AbstractContextManager[Predictor]]


class ModelPredictor:
    """A loaded artifact, fed in pieces as a prompt is."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def predict(self, windows: Sequence[Window]) -> Iterator[Logits]:
        """As `Predictor`."""
        sequence = self._model.create_sequence()
        try:
            for window in windows:
                yield np.concatenate(list(sequence.logits_of_last(window.fed_ids, window.scored, from_scratch=True)))
        finally:
            sequence.close()


def artifact_reference(folder: Path) -> Reference:
    """An artifact as reference: with exact arithmetic, on the CPU.

    Raises:
        ArtifactError: it is damaged, incomplete, or from a newer version.
    """
    artifact = Artifact.open(folder)
    manifest = artifact.manifest

    @contextmanager
    def load_exact() -> Iterator[Predictor]:
        from normistral.runtime.loading import load

        with load(folder, exact=True) as model:
            yield ModelPredictor(model)

    source = f"artifact {artifact.manifest_sha256()}, exact"
    return Reference(folder.name, source, folder, manifest.architecture.vocabulary, manifest.context_length, load_exact)


def make_key(reference: Reference, manifest: Manifest, text: str, ours: Text, settings: WindowSettings) -> ReferenceKey:
    """The key of a reference's predictions, after checking that they can be compared with the artifact's.

    Raises:
        UsageError: another vocabulary, or a context that is too short.
    """
    hint = "give a reference of the same family; --reference may be the checkpoint that the artifact was made from"
    if reference.vocabulary != manifest.architecture.vocabulary:
        raise UsageError(
            f"the reference {reference.name} predicts {reference.vocabulary} tokens, "
            f"the artifact {manifest.architecture.vocabulary}",
            hint,
        )
    tokenizer_sha256 = sha256_file(reference.folder / TOKENIZER_NAME)
    recorded = manifest.files.get(TOKENIZER_NAME)
    same = recorded is not None and recorded.sha256 == tokenizer_sha256
    if not same and tokenise(text, Tokenizer.from_folder(reference.folder)).token_ids != ours.token_ids:
        raise UsageError(f"the reference {reference.name} splits this text into other tokens", hint)
    if reference.context_length is not None and settings.length > reference.context_length:
        raise UsageError(
            f"a window of {settings.length} tokens does not fit the reference's context, {reference.context_length}",
            f"give --window-tokens {reference.context_length}",
        )
    return ReferenceKey(ours.sha256, tokenizer_sha256, reference.source, settings, reference.vocabulary)


def write_reference(file: ReferenceFile, predictor: Predictor, on_tokens: Callable[[int], None]) -> None:
    """Complete the file.

    Args:
        on_tokens: called with the number of tokens just scored.

    Raises:
        EngineError: the reference failed.
    """
    windows = list(file.missing)
    for window, logits in zip(windows, predictor.predict(windows), strict=True):
        file.append(_require_finite(logits, "reference"))
        on_tokens(window.scored)


def score(
    predictor: Predictor,
    windows: Sequence[Window],
    text: Text,
    reference: ReferenceFile | None,
    on_tokens: Callable[[int], None],
) -> TokenScores:
    """Score every token of the windows.

    Args:
        reference: complete for these windows, or None.
        on_tokens: called with the number of tokens just scored.

    Raises:
        EngineError: the artifact failed.
    """
    nll, nbytes, reference_nll, kl, agrees = [], [], [], [], []
    for index, (window, logits) in enumerate(zip(windows, predictor.predict(windows), strict=True)):
        nll.append(token_nll(_require_finite(logits, "artifact"), np.array(window.targets)))
        nbytes.append(text.nbytes[window.start : window.start + window.scored])
        if reference is not None:
            rows = reference.read(index)
            reference_nll.append(rows.nll)
            kl.append(kl_divergences(rows.log_probabilities, logits))
            agrees.append(logits.argmax(axis=-1) == rows.likeliest)
        on_tokens(window.scored)
    if reference is None:
        return TokenScores(np.concatenate(nll), np.concatenate(nbytes))
    return TokenScores(*(np.concatenate(column) for column in (nll, nbytes, reference_nll, kl, agrees)))


def take_windows(windows: Sequence[Window], max_tokens: int | None) -> Sequence[Window]:
    """The first windows, up to the one that brings the scored tokens to `max_tokens`; None is all.

    Raises:
        UsageError: it is not at least 1.
    """
    if max_tokens is None:
        return windows
    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} leaves nothing to score", "give at least 1")
    scored = 0
    for count, window in enumerate(windows, start=1):
        scored += window.scored
        if scored >= max_tokens:
            return windows[:count]
    return windows


def _require_finite(logits: Logits, whose: str) -> Logits:
    if not np.isfinite(logits).all():
        raise EngineError(
            f"the {whose} returned logits that are not finite",
            "try --exact; if that does not help, export the model again",
        )
    return logits
