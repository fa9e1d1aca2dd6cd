"""From an artifact to a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from normistral.artifact.artifact import Artifact
from normistral.runtime.engines.base import Backend
from normistral.runtime.engines.settings import DEFAULT_CONFIG, EngineConfig
from normistral.runtime.interpreter_exit import computing
from normistral.runtime.model import Model
from normistral.runtime.options import refuse_draft_table


def load(
    artifact: str | Path,
    device: str = "CPU",
    *,
    exact: bool = False,
    settings: Mapping[str, str] | None = None,
    draft_table: str | Path | None = None,
    download: bool = False,
) -> Model:
    """Load an exported artifact.

    Args:
        artifact: a folder, a name in the local store, or OWNER/NAME or OWNER/NAME@REVISION of a published artifact.
        device: CPU, or another device of the artifact's engine (OpenVINO: GPU, GPU.1, AUTO ...; ONNX: CUDA, CUDA:1,
            DIRECTML ...: `normistral doctor` lists those that are there).
        exact: reference arithmetic, for proofs and comparisons: float32 and no run-time quantisation. Slower.
        settings: engine settings by the engine's own names, over the plan for this machine: properties of OpenVINO;
            of onnxruntime fields of its SessionOptions, "session." entries and `accuracy_level` of MatMulNBits; for
            both `prefill_chunk`, tokens of a prompt that are fed at once. `Model.capabilities` shows what is in force.
        draft_table: refused; tables of n-grams to draft from were removed.
        download: fetch a published artifact that is not in the store. Otherwise nothing is connected to.

    Raises:
        UsageError: an unknown setting, a value that the engine does not take, or one that would change the arithmetic
            of `exact`.
        ModelNotFoundError: no such artifact.
        ArtifactError: it is damaged, incomplete, or from a newer version.
        DownloadError, ResourceError: it cannot be fetched.
        MissingExtraError: the artifact's engine is not installed.
        DeviceError: the device is not there.
        EngineError: the engine could not load it.
    """
    if draft_table is not None:
        refuse_draft_table("draft_table")
    if download:
        from normistral.artifact.download import find_or_download

        artifact = find_or_download(str(artifact))
    opened = Artifact.find(artifact)
    opened.warn_of_advice()
    return open_model(opened, EngineConfig(device, exact, settings or {}))


def open_model(artifact: Artifact, config: EngineConfig = DEFAULT_CONFIG) -> Model:
    """Load an opened artifact; errors as in `load`."""
    tokenizer = artifact.tokenizer
    with computing():
        backend = load_backend(artifact, config)
    return Model(backend, artifact.manifest, tokenizer, name=artifact.name)


def load_backend(artifact: Artifact, config: EngineConfig = DEFAULT_CONFIG) -> Backend:
    """Load the weights of an artifact on its engine; errors as in `load`."""
    if artifact.manifest.format == "openvino":
        from normistral.runtime.engines.openvino import load_openvino

        return load_openvino(artifact, config)
    from normistral.runtime.engines.onnxruntime import load_onnx

    return load_onnx(artifact, config)
