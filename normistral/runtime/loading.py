"""From an artifact to a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest
from normistral.errors import UsageError
from normistral.hardware import read_machine
from normistral.runtime.engines.base import Backend
from normistral.runtime.engines.settings import DEFAULT_CONFIG, EngineConfig
from normistral.runtime.interpreter_exit import computing
from normistral.runtime.model import Model
from normistral.runtime.options import refuse_draft_table
from normistral.runtime.providers import import_onnxruntime
from normistral.runtime.tuned import find_tuned, make_key


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

    What `normistral tune` found for this artifact on this machine takes the place of the plan, unless `exact`.

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
    if not isinstance(device, str):
        raise UsageError(f"a device is named by a text, not by {device!r}", "such as CPU; leave it out for that")
    if not isinstance(settings, Mapping | None):
        raise UsageError(f"settings are a mapping, not a {type(settings).__name__}", 'such as {"prefill_chunk": "512"}')
    if draft_table is not None:
        refuse_draft_table("draft_table")
    if download:
        from normistral.artifact.download import find_or_download

        artifact = find_or_download(str(artifact))
    opened = Artifact.find(artifact)
    opened.warn_of_advice()
    tuned = None if exact else find_tuned_settings(opened, device)
    return open_model(opened, EngineConfig(device, exact, settings or {}, tuned))


def open_model(artifact: Artifact, config: EngineConfig = DEFAULT_CONFIG) -> Model:
    """Load an opened artifact; errors as in `load`. No tuned settings are looked for but those of `config`."""
    tokenizer = artifact.tokenizer
    with computing():
        backend = load_backend(artifact, config)
    return Model(backend, artifact.manifest, tokenizer, name=artifact.name)


def find_tuned_settings(artifact: Artifact, device: str) -> Mapping[str, str] | None:
    """Settings that `normistral tune` found for an artifact on this machine; None without.

    Raises:
        MissingExtraError: the artifact's engine is not installed.
    """
    engine, version = find_engine(artifact.manifest)
    found = find_tuned(make_key(artifact.folder, read_machine(), engine, version, device))
    return None if found is None else found.settings


def find_engine(manifest: Manifest) -> tuple[str, str]:
    """Name and version of the engine that runs an artifact.

    Raises:
        MissingExtraError: it is not installed.
    """
    if manifest.format == "openvino":
        import openvino

        return "openvino", str(openvino.__version__)
    return "onnxruntime", str(import_onnxruntime().__version__)


def load_backend(artifact: Artifact, config: EngineConfig = DEFAULT_CONFIG) -> Backend:
    """Load the weights of an artifact on its engine; errors as in `load`."""
    if artifact.manifest.format == "openvino":
        from normistral.runtime.engines.openvino import load_openvino

        return load_openvino(artifact, config)
    from normistral.runtime.engines.onnxruntime import load_onnx

    return load_onnx(artifact, config)
