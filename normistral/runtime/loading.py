"""From an artifact to a loaded model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from normistral.artifact import store
from normistral.artifact.advisory import find_advice
from normistral.artifact.manifest import Manifest, check_files, read_manifest
from normistral.artifact.tokenizer import TOKENIZER_NAME, Tokenizer
from normistral.errors import ArtifactError
from normistral.files import sha256_file
from normistral.hardware import read_machine
from normistral.runtime.drafting.table import NgramTable
from normistral.runtime.engines.base import Backend
from normistral.runtime.interpreter_exit import computing
from normistral.runtime.model import Model
from normistral.runtime.providers import import_onnxruntime
from normistral.runtime.tuned import find_tuned, make_key

logger = logging.getLogger(__name__)


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
    folder = store.resolve_artifact(str(artifact))
    manifest = read_manifest(folder)
    check_files(folder, manifest, thorough=False)
    warn_of_advice(folder, manifest)
    tuned = None if exact else find_tuned_settings(folder, manifest, device)
    return open_model(folder, manifest, device, exact=exact, tuned=tuned, given=settings, draft_table=draft_table)


def warn_of_advice(folder: Path, manifest: Manifest) -> None:
    """Say in the log if an earlier version may have made this artifact wrong."""
    advice = find_advice(folder, manifest)
    if advice is not None:
        logger.warning("%s: %s", folder.name, advice)


def open_model(
    folder: Path,
    manifest: Manifest,
    device: str = "CPU",
    *,
    exact: bool = False,
    tuned: Mapping[str, str] | None = None,
    given: Mapping[str, str] | None = None,
    draft_table: str | Path | None = None,
) -> Model:
    """Load an artifact whose files were checked; arguments and errors as in `load`.

    Args:
        tuned: settings of an earlier `normistral tune`; none is looked for.
        given: settings over those.
    """
    tokenizer = open_tokenizer(folder, manifest)
    table = None
    if draft_table is not None:
        tokenizer_sha256 = sha256_file(folder / TOKENIZER_NAME)
        table = NgramTable.read(Path(draft_table), tokenizer_sha256, manifest.architecture.vocabulary)
    with computing():
        backend = load_backend(folder, manifest, device, exact, tuned, given)
    return Model(backend, manifest, tokenizer, name=folder.name, draft_table=table)


def open_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of an artifact.

    Raises:
        ArtifactError: it is damaged, or has more tokens than the model.
    """
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocabulary_size > manifest.architecture.vocabulary:
        raise ArtifactError(
            f"the tokenizer of {folder.name} has {tokenizer.vocabulary_size} tokens, "
            f"the model {manifest.architecture.vocabulary}",
            "export the model again",
        )
    return tokenizer


def find_tuned_settings(folder: Path, manifest: Manifest, device: str) -> Mapping[str, str] | None:
    """What `normistral tune` found for an artifact on this machine, if it did.

    Raises:
        MissingExtraError: the artifact's engine is not installed.
    """
    engine, version = find_engine(manifest)
    found = find_tuned(make_key(folder, read_machine(), engine, version, device))
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


def load_backend(
    folder: Path,
    manifest: Manifest,
    device: str,
    exact: bool,
    tuned: Mapping[str, str] | None = None,
    given: Mapping[str, str] | None = None,
) -> Backend:
    """The weights of an artifact on its engine; arguments and errors as in `open_model`."""
    if manifest.format == "openvino":
        from normistral.runtime.engines.openvino import load_openvino

        return load_openvino(folder, manifest, device, exact=exact, tuned=tuned, given=given)
    from normistral.runtime.engines.onnxruntime import load_onnx

    return load_onnx(folder, manifest, device, exact=exact, tuned=tuned, given=given)
