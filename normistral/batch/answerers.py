"""Which way a batch job's answers are computed, and the model loaded for it."""

from __future__ import annotations

from importlib.util import find_spec

from normistral.artifact.manifest import Manifest, read_manifest
from normistral.batch.job import Answerer, Engine, Job


def fits_together(manifest: Manifest, engine: Engine) -> bool:
    """Whether this model's answers can be computed together, if openvino_genai is there."""
    return engine.batching == "auto" and manifest.format == "openvino" and engine.device == "CPU"


def has_genai() -> bool:
    """Whether openvino_genai is there."""
    return find_spec("openvino_genai") is not None


def open_answerer(job: Job, engine: Engine, workers: int = 1) -> Answerer:
    """Load the model, in the process that is to answer.

    Args:
        workers: how many share the machine's memory.

    Raises:
        NormistralError: as `normistral.load`.
    """
    if fits_together(read_manifest(job.artifact), engine) and has_genai():
        from normistral.batch.together import open_together

        return open_together(job, engine, workers)
    from normistral.batch.one_by_one import OneByOne

    return OneByOne(job, engine)
