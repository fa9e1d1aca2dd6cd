"""Which batch serves an artifact: the one place where that is decided."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from normistral.runtime import model as models
from normistral.runtime.engines.base import Capabilities
from normistral.serving.backends.base import Batch
from normistral.serving.backends.fair_queue import FairQueue
from normistral.serving.backends.settings import FAIR_SLOTS, BatchSettings


class Created(NamedTuple):
    """A batch, and what there is to say of it.

    Attributes:
        slots: jobs that it should be given at once.
        batching: how they share the model, in a word.
    """

    batch: Batch
    capabilities: Capabilities
    slots: int
    batching: str


def create_batch(
    folder: Path, device: str, settings: BatchSettings, *, exact: bool, engine_settings: Mapping[str, str]
) -> Created:
    """Load an artifact for many jobs at once.

    Raises:
        NormistralError: as `normistral.load`.
    """
    model = models.load(folder, device, exact=exact, settings=engine_settings)
    return Created(FairQueue(model, settings), model.capabilities, settings.slots or FAIR_SLOTS, "turns")
