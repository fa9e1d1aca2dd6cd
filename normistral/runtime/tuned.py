"""Results of `normistral tune`: one file for an artifact on a machine, beside the store; `load` reads it.

The file counts only where all of its key holds: the manifest of the artifact, the machine with its limits, the engine
and its version. Anything else (another file of that name, a damaged one, another user's, settings that no tuning can
come to) is never an error at load: the rule for this kind of machine serves, and a warning says so.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from normistral.artifact import store
from normistral.artifact.manifest import MANIFEST_NAME, Sha256
from normistral.errors import ResourceError
from normistral.files import atomic_write, explain, is_own, open_file, sha256_file
from normistral.hardware import Machine, plan_threads
from normistral.runtime.engines.settings import ENGINES_KERNEL, INT4_KERNEL, OUR_KERNEL, PREFILL_CHUNK

logger = logging.getLogger(__name__)

VERSION = 1
BUDGET_MINUTES = 5.0  # of a search, unless the user says more or less
_MAX_BYTES = 2**16
_AGAIN = "tune it again, or drop it: normistral tune ARTIFACT --forget"

Profile = Literal["chat", "documents", "batch"]
Seconds = Annotated[float, msgspec.Meta(ge=1e-9, le=1e9)]
Nats = Annotated[float, msgspec.Meta(ge=0.0, le=1e3)]

# All that a tuning comes to (`normistral.tuning`, and what an engine reports of itself), as regular expressions.
# Much else is a setting of the engine, and would be passed on: a folder for its cache, a file to read properties from.
_CHUNK = "64|128|256|512|1024"
_PRODUCED = {
    "openvino": {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32|bf16|f16",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0|32|64|128",
        "KV_CACHE_PRECISION": "u8|f32|bf16|f16",
        "ENABLE_CPU_PINNING": "YES|NO",
        "ENABLE_HYPER_THREADING": "YES|NO",
        INT4_KERNEL: f"{OUR_KERNEL}|{ENGINES_KERNEL}",
        PREFILL_CHUNK: _CHUNK,
    },
    "onnxruntime": {
        "inter_op_num_threads": "1",
        "session.intra_op.allow_spinning": "0|1",
        "session.use_device_allocator_for_initializers": "1",
        "accuracy_level": "1|4",
        "activation_bits": "8|16",
        PREFILL_CHUNK: _CHUNK,
    },
}
_THREADS = {"openvino": "INFERENCE_NUM_THREADS", "onnxruntime": "intra_op_num_threads"}


@dataclass(frozen=True, slots=True)
class TunedFor:
    """Artifact, machine and engine of a result.

    Attributes:
        manifest_sha256: of the artifact's normistral.json, which has the hashes of all its files.
        threads: what `hardware.plan_threads` gives, so a container's limit counts only as far as it matters.
        engine_version: a new one has new kernels.
    """

    manifest_sha256: Sha256
    cpu: str
    physical_cores: int
    logical_cpus: int
    threads: int
    instruction_sets: tuple[str, ...]
    device: str
    engine: str
    engine_version: str


@dataclass(frozen=True, slots=True)
class Tuned:
    """A result.

    Attributes:
        key: what it holds for.
        artifact: the folder's name, for people.
        created: UTC, ISO 8601.
        profile: the kind of work that was measured.
        settings: all of them, the rule's included, as `load` takes them.
        changed: names of those that differ from the rule.
        rule_s, tuned_s: seconds of the measured work with the rule's settings and with these, medians of pairs.
        kl: mean KL divergence of these settings from exact arithmetic on our text, in nats; kl_bound: what was allowed.
        complete: whether the whole search was done, or time ran out.
    """

    key: TunedFor
    artifact: str
    created: str
    profile: Profile
    settings: dict[str, str]
    changed: tuple[str, ...]
    rule_s: Seconds
    tuned_s: Seconds
    kl: Nats
    kl_bound: Nats
    complete: bool
    version: int = VERSION
    checksum: str = ""

    @property
    def gain(self) -> float:
        """How many times as fast as the rule; 1.0 is as fast."""
        return self.rule_s / self.tuned_s


class StoredTuned(NamedTuple):
    """One file of the store; `content` is its result, or the text that says why it has none that can be used."""

    path: Path
    content: Tuned | str


def make_key(folder: Path | None, machine: Machine, engine: str, engine_version: str, device: str) -> TunedFor:
    """The key of an artifact on this machine; without an artifact, of none."""
    return TunedFor(
        "0" * 64 if folder is None else sha256_file(folder / MANIFEST_NAME),
        machine.cpu,
        machine.physical_cores,
        machine.logical_cpus,
        plan_threads(machine),
        tuple(sorted(machine.instruction_sets)),
        device,
        engine,
        engine_version,
    )


def find_tuned(key: TunedFor) -> Tuned | None:
    """The result for exactly this key; None, with a warning in the log, for one that is stale or damaged."""
    path = tuned_path(key)
    try:
        tuned = read_tuned(path)
    except (FileNotFoundError, NotADirectoryError):  # a home such as /dev/null
        return None
    except (OSError, ValueError) as exc:
        reason = f"{path}: {explain(exc)[0]}" if isinstance(exc, OSError) else exc
        logger.warning("the settings that were tuned for this artifact cannot be used (%s): %s", reason, _AGAIN)
        return None
    if problem := find_mismatch(tuned.key, key):
        logger.warning(
            "the settings that were tuned for %s do not count here (%s): %s", tuned.artifact, problem, _AGAIN
        )
        return None
    return tuned


def find_mismatch(tuned: TunedFor, here: TunedFor) -> str | None:
    """Reason why a result does not hold here; None if it does."""
    for name in TunedFor.__slots__:
        then, now = getattr(tuned, name), getattr(here, name)
        if then != now:
            if name == "manifest_sha256":
                return "the artifact is another one"
            return f"{name.replace('_', ' ')}: {_shown(then)} then, {_shown(now)} now"
    return None


def save_tuned(tuned: Tuned) -> Path:
    """Write a result over what was there for its artifact and machine.

    Raises:
        ResourceError: the store cannot be written to.
    """
    path = tuned_path(tuned.key)
    raw = msgspec.json.format(msgspec.json.encode(replace(tuned, checksum=_checksum(tuned))), indent=2) + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(raw)
    except OSError as exc:
        raise ResourceError(
            f"the result cannot be kept in {path.parent}: {explain(exc)[0]}",
            "give NORMISTRAL_HOME a folder that can be written to",
        ) from exc
    return path


def read_tuned(path: Path) -> Tuned:
    """Read and check a result.

    Raises:
        OSError: it is not there, or not to be read, or no file.
        ValueError: it is damaged, of another version, of another user, or no result of a tuning.
    """
    with os.fdopen(open_file(path, follow=False), "rb") as file:
        status = os.fstat(file.fileno())
        raw = file.read(_MAX_BYTES + 1)
    if os.name == "posix" and not (is_own(status) or status.st_uid == 0):
        raise ValueError(f"{path} belongs to another user")
    if os.name == "posix" and status.st_mode & 0o022:
        raise ValueError(f"{path} can be written by others")
    if len(raw) > _MAX_BYTES:
        raise ValueError(f"{path} is damaged: it is larger than {_MAX_BYTES} bytes")
    try:
        document: Any = msgspec.json.decode(raw)
        if isinstance(document, dict) and document.get("version") != VERSION:
            raise ValueError(f"{path} is of version {document.get('version')}, not {VERSION}")
        tuned = msgspec.convert(document, Tuned)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ValueError(f"{path} is damaged: {exc}") from exc
    if tuned.checksum != _checksum(tuned):
        raise ValueError(f"{path} was changed after it was written")
    if msgspec.json.decode(msgspec.json.encode(tuned)) != document:
        raise ValueError(f"{path} is damaged: it has fields that no result has")
    if problem := find_strange_setting(tuned):
        raise ValueError(f"{path} is no result of a tuning: {problem}")
    return tuned


def find_strange_setting(tuned: Tuned) -> str | None:
    """A setting that no tuning comes to on the machine of the key; None if there is none."""
    engine = tuned.key.engine
    if engine not in _PRODUCED:
        return f"there is no engine {engine}"
    for name, value in tuned.settings.items():
        if name == _THREADS[engine]:
            fits = bool(re.fullmatch("[1-9][0-9]{0,4}", value)) and int(value) <= tuned.key.logical_cpus
        else:
            fits = bool(re.fullmatch(_PRODUCED[engine].get(name, "(?!)"), value))
        if not fits:
            return f"{name}={value}"
    return next((f"{name} changed, and is not set" for name in tuned.changed if name not in tuned.settings), None)


def list_tuned(manifest_sha256: str | None = None) -> Iterator[StoredTuned]:
    """Results, by file name; of one artifact, or of all. Damaged files are told by their name alone."""
    for path in sorted(store.tuned_dir().glob(f"{manifest_sha256[:16] if manifest_sha256 else ''}*.json")):
        try:
            yield StoredTuned(path, read_tuned(path))
        except OSError as exc:
            yield StoredTuned(path, explain(exc)[0])
        except ValueError as exc:
            yield StoredTuned(path, str(exc))


def forget_tuned(manifest_sha256: str) -> list[Path]:
    """Delete an artifact's results, those of other machines included; returns what was deleted."""
    paths = [stored.path for stored in list_tuned(manifest_sha256)]
    files = [path for path in paths if path.is_symlink() or not path.is_dir()]
    for path in files:
        path.unlink(missing_ok=True)
    return files


def tuned_path(key: TunedFor) -> Path:
    """One file for an artifact, machine, engine and device; a new version of the engine overwrites the old one's."""
    place = replace(key, engine_version="")
    return (
        store.tuned_dir()
        / f"{key.manifest_sha256[:16]}-{hashlib.sha256(msgspec.json.encode(place)).hexdigest()[:16]}.json"
    )


def _checksum(tuned: Tuned) -> str:
    return hashlib.sha256(msgspec.json.encode(replace(tuned, checksum=""))).hexdigest()


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
