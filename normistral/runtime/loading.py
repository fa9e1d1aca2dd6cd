"""From an artifact to a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest
from normistral.artifact.tokenizer import TOKENIZER_NAME
from normistral.files import sha256_file
from normistral.hardware import read_machine
from normistral.runtime.drafting.table import NgramTable
from normistral.runtime.engines.base import DEFAULT_CONFIG, Backend, EngineConfig
from normistral.runtime.interpreter_exit import computing
from normistral.runtime.model import Model
from normistral.runtime.providers import import_onnxruntime
from normistral.runtime.tuned import find_tuned, make_key


def load(
    artifact: str | Path,
    device: str = "CPU",
    *,
    exact: bool = False,
    settings: Mapping[str, str] | None = None,
    draft_table: str | Path | None = None,
) -> Model:
    """Load an exported artifact.

    Args:
        artifact: a folder, or a name in the local store.
        device: CPU, or another device of the artifact's engine (OpenVINO: GPU, GPU.1, AUTO ...; ONNX: CUDA, CUDA:1,
            DIRECTML ...: `normistral doctor` lists those that are there).
        exact: reference arithmetic, for proofs and comparisons: float32 and no run-time quantisation. Slower.
        settings: engine settings by the engine's own names, over the plan for this machine: properties of OpenVINO;
            of onnxruntime fields of its SessionOptions, "session." entries and `accuracy_level` of MatMulNBits; for
            both `prefill_chunk`, tokens of a prompt that are fed at once. `Model.capabilities` shows what is in force.
        draft_table: a file of n-grams that `normistral draft-table` made; guesses tokens where the text so far gives
            no guess.

    What `normistral tune` found for this artifact on this machine takes the place of the plan, unless `exact`.

    Raises:
        UsageError: an unknown setting, a value that the engine does not take, or one that would change the arithmetic
            of `exact`; or the draft table cannot be read, or belongs to another tokenizer.
        ModelNotFoundError: no such artifact.
        ArtifactError: it is damaged, incomplete, or from a newer version.
        MissingExtraError: the artifact's engine is not installed.
        DeviceError: the device is not there.
        EngineError: the engine could not load it.
    """
    opened = Artifact.find(artifact)
    opened.warn_of_advice()
    tuned = None if exact else find_tuned_settings(opened, device)
    return open_model(opened, EngineConfig(device, exact, settings or {}, tuned), draft_table=draft_table)


def open_model(
    artifact: Artifact, config: EngineConfig = DEFAULT_CONFIG, *, draft_table: str | Path | None = None
) -> Model:
    """Load an opened artifact; errors as in `load`. No tuned settings are looked for but those of `config`."""
    table = None
    if draft_table is not None:
        tokenizer_sha256 = sha256_file(artifact.folder / TOKENIZER_NAME)
        table = NgramTable.read(Path(draft_table), tokenizer_sha256, artifact.manifest.architecture.vocabulary)
    tokenizer = artifact.tokenizer
    with computing():
        backend = load_backend(artifact, config)
    return Model(backend, artifact.manifest, tokenizer, name=artifact.name, draft_table=table)


def find_tuned_settings(artifact: Artifact, device: str) -> Mapping[str, str] | None:
    """What `normistral tune` found for an artifact on this machine, if it did.

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
