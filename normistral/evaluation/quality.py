"""The quality of an artifact on a text: perplexity, and its distance to a reference.

The reference's predictions go to disk, then the artifact's are compared with them; the two are never in memory
together. A reference is known by its predictions alone: another artifact makes them, or a checkpoint that
`normistral.export` runs.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

import numpy as np

from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest
from normistral.artifact.tokenizer import TOKENIZER_NAME, Tokenizer
from normistral.errors import EngineError, UsageError
from normistral.evaluation.metrics import Quality, ScoredTokens, kl_divergences, summarise, token_nll
from normistral.evaluation.reference_logits import ReferenceFile, ReferenceKey
from normistral.evaluation.windows import (
    TokenizedText,
    Window,
    WindowSettings,
    choose_windows,
    cut,
    take_windows,
    tokenise,
)
from normistral.files import sha256_file
from normistral.progress import Progress, format_bytes
from normistral.runtime.engines.base import EngineInfo, Logits
from normistral.runtime.engines.settings import DEFAULT_CONFIG, EngineConfig
from normistral.runtime.model import Model


class Predictor(Protocol):
    """Anything that predicts the scored tokens of windows."""

    def predict(self, windows: Sequence[Window]) -> Iterator[Logits]:
        """Float32 [scored, vocabulary] for each window, in their order."""


@dataclass(frozen=True, slots=True)
class ReferenceModel:
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
        """Logits of each window, as in `Predictor`."""
        sequence = self._model.create_sequence()
        try:
            for window in windows:
                yield np.concatenate(list(sequence.logits_of_last(window.fed_ids, window.scored, from_scratch=True)))
        finally:
            sequence.close()


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Choices of an evaluation.

    Attributes:
        windows: "sliding" or "llama.cpp"; window_tokens, stride: None is the default of `choose_windows`.
        max_tokens: stop after the window that brings the scored tokens to this number; None scores the whole text.
        reference_cache: file of the reference's predictions.
    """

    windows: str = "sliding"
    window_tokens: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    reference_cache: Path | None = None
    engine: EngineConfig = DEFAULT_CONFIG


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of an artifact on a text, and how they came about.

    Attributes:
        windows: number of windows scored.
        engine: capabilities of the engine that ran.
    """

    manifest: Manifest
    text: TokenizedText
    settings: WindowSettings
    windows: int
    quality: Quality
    engine: EngineInfo


def evaluate(
    artifact: Artifact,
    text: str,
    plan: EvaluationPlan,
    progress: Progress,
    open_reference: Callable[[], AbstractContextManager[ReferenceModel]] | None = None,
    cache: Path | None = None,
) -> Evaluation:
    """Score a text with an artifact, and compare with a reference.

    Args:
        open_reference: the model to compare with; it is closed before the artifact is loaded.
        cache: folder for the reference's predictions where the plan names no file.

    Raises:
        NormistralError: windows that do not fit, a damaged artifact, a reference of another vocabulary, or a failing
            engine.
    """
    manifest = artifact.manifest
    tokens = tokenise(text, artifact.tokenizer)
    settings = choose_windows(
        plan.windows,
        plan.window_tokens,
        plan.stride,
        context_length=manifest.context_length,
        bos_id=manifest.bos_token_id if manifest.adds_bos else None,
    )
    windows = take_windows(cut(tokens.token_ids, settings), plan.max_tokens)
    predictions: AbstractContextManager[ReferenceFile | None] = nullcontext()
    if open_reference is not None:
        with open_reference() as reference:
            key = make_key(reference, manifest, text, tokens, settings)
            file = plan.reference_cache or (cache or Path()) / key.file_name()
            predictions = _complete_predictions(ReferenceFile(file, key, windows), reference, progress)
    with predictions as rows:
        quality, engine = _score_artifact(artifact.folder, plan, windows, tokens, rows, progress)
    return Evaluation(manifest, tokens, settings, len(windows), quality, engine)


def _complete_predictions(file: ReferenceFile, reference: ReferenceModel, progress: Progress) -> ReferenceFile:
    """Compute the predictions that the file lacks; an error closes it."""
    missing = sum(window.scored for window in file.missing)
    if not missing:
        progress.note(f"the reference's predictions are in {file.path}")
        return file
    if file.finished:
        progress.note(f"going on after window {file.finished} of {file.path}")
    try:
        with (
            interrupts_win(),
            reference.open() as predictor,
            progress.stage("reference", missing, "tokens") as stage,
        ):
            write_reference(file, predictor, stage.advance)
    except BaseException as exc:
        if isinstance(exc, KeyboardInterrupt):
            progress.note(f"{file.finished} windows are kept in {file.path}; the same command goes on from there")
        file.__exit__()
        raise
    progress.note(f"the reference's predictions: {file.path}, {format_bytes(file.path.stat().st_size)}")
    return file


def _score_artifact(
    folder: Path,
    plan: EvaluationPlan,
    windows: Sequence[Window],
    text: TokenizedText,
    reference: ReferenceFile | None,
    progress: Progress,
) -> tuple[Quality, EngineInfo]:
    from normistral.runtime.loading import load

    with progress.stage("loading"):
        model = load(folder, plan.engine.device, exact=plan.engine.exact, settings=plan.engine.settings)
    with model, progress.stage("scoring", sum(window.scored for window in windows), "tokens") as stage:
        quality = summarise(score(ModelPredictor(model), windows, text, reference, stage.advance))
        return quality, model.capabilities


def artifact_reference(folder: Path) -> ReferenceModel:
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
    return ReferenceModel(
        folder.name, source, folder, manifest.architecture.vocabulary, manifest.context_length, load_exact
    )


def make_key(
    reference: ReferenceModel, manifest: Manifest, text: str, ours: TokenizedText, settings: WindowSettings
) -> ReferenceKey:
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
    text: TokenizedText,
    reference: ReferenceFile | None,
    on_tokens: Callable[[int], None],
) -> ScoredTokens:
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
        return ScoredTokens(np.concatenate(nll), np.concatenate(nbytes))
    return ScoredTokens(*(np.concatenate(column) for column in (nll, nbytes, reference_nll, kl, agrees)))


def _require_finite(logits: Logits, whose: str) -> Logits:
    if not np.isfinite(logits).all():
        raise EngineError(
            f"the {whose} returned logits that are not finite",
            "try --exact; if that does not help, export the model again",
        )
    return logits


@contextmanager
def interrupts_win() -> Iterator[None]:
    """Raise KeyboardInterrupt for an error that follows a Ctrl-C in this block.

    transformers makes its attention masks under torch's vmap, which turns a KeyboardInterrupt that comes just there
    into a RuntimeError ("NYI: querying is_contiguous inside of vmap").
    """
    in_charge = threading.current_thread() is threading.main_thread()
    if not in_charge or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else handles it, or it is ignored
        return
    pressed = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as exc:
        if pressed.is_set():
            raise KeyboardInterrupt from exc
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
