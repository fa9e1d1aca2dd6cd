"""Loads an artifact with one set of settings after the other, and measures speed and quality. One model at a time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Self

from normistral.artifact.artifact import Artifact
from normistral.errors import EngineError, UsageError
from normistral.runtime.engines.base import Logits
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.loading import open_model
from normistral.runtime.model import Model
from normistral.tuning.quality import predict, settings_kl, take_probe
from normistral.tuning.search import OutOfTimeError, UnusableError
from normistral.tuning.space import REPORTED, Settings
from normistral.tuning.work import Work, measure


class Workbench:
    """Loads the artifact with one set of settings after the other, and measures it."""

    def __init__(
        self,
        artifact: Artifact,
        work: Work,
        token_ids: Sequence[int],
        deadline: float,
        clock: Callable[[], float],
    ) -> None:
        self.artifact, self.manifest, self.work = artifact, artifact.manifest, work
        self.deadline = deadline
        self.on_measured: Callable[[int], None] = lambda count: None
        self._token_ids = token_ids
        self._probe = take_probe(token_ids, self.manifest.context_length)
        self._clock = clock
        self._exact: Logits | None = None
        self._kl: dict[frozenset[tuple[str, str]], float] = {}
        self._seconds: dict[frozenset[tuple[str, str]], list[float]] = {}
        self._model: Model | None = None
        self._settings: dict[str, str] | None = None

    def take_reference(self) -> None:
        """Predictions in exact arithmetic."""
        self.close()
        with open_model(self.artifact, EngineConfig(exact=True)) as model:
            self._exact = predict(model, self._probe)

    def settings_in_force(self, settings: Settings) -> dict[str, str]:
        """These settings and what the engine chose beside them, as far as it can be asked for."""
        self.close()
        # As tuned settings, which the engine may adapt: for the rule's that is right, and its answer is what counts.
        self._model = open_model(self.artifact, EngineConfig(tuned=settings))
        in_force = self._model.capabilities.settings
        self._settings = {
            name: value
            for name, value in in_force.items()
            if name in settings or (name in REPORTED and "," not in value)  # "1,4": a graph with both levels
        }
        return dict(self._settings)

    def measure(self, settings: Settings) -> float:
        """Seconds of the work.

        Raises:
            OutOfTimeError: the budget is spent.
            UnusableError: the engine refuses the settings.
        """
        if self._clock() > self.deadline:
            raise OutOfTimeError
        try:
            seconds = measure(self._load(settings), self.work, self._token_ids)
        except (UsageError, EngineError) as exc:
            raise UnusableError(exc.message) from exc
        self._seconds.setdefault(_frozen(settings), []).append(seconds)
        self.on_measured(1)
        return seconds

    def median_seconds(self, settings: Settings) -> float | None:
        """Of all measurements of these settings."""
        measured = self._seconds.get(_frozen(settings))
        return None if measured is None else statistics.median(measured)

    def kl(self, settings: Settings) -> float:
        """Mean KL divergence from exact arithmetic, nats; measured once."""
        key = _frozen(settings)
        if key not in self._kl:
            assert self._exact is not None, "take_reference comes first"
            self._kl[key] = settings_kl(self._exact, self._load(settings), self._probe)
        return self._kl[key]

    def close(self) -> None:
        """Free the model."""
        if self._model is not None:
            self._model.close()
        self._model = self._settings = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _load(self, settings: Settings) -> Model:
        if self._model is None or self._settings != settings:
            self.close()
            self._model = open_model(self.artifact, EngineConfig(settings=settings))
            self._settings = dict(settings)
        return self._model


def _frozen(settings: Settings) -> frozenset[tuple[str, str]]:
    return frozenset(settings.items())
