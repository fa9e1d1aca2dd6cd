"""normistral.json: the contract between export and runtime.

The exporter writes it last; the runtime believes it and nothing else about an artifact. Fields are checked when it is
read: a wrong type, an unknown field or an impossible value is an `ArtifactError`, never a guess. The file carries a
checksum over itself and the SHA-256 and size of every other file, so that any changed bit can be found.

It does not know how artifacts are made or run.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from normistral.errors import EXPORT_AGAIN, UPGRADE, ArtifactError
from normistral.files import sha256_file
from normistral.progress import OnBytes, ignore_bytes

MANIFEST_NAME = "normistral.json"
# 2: ONNX. 3: ALiBi, reasoning. 4: calibration. 5: mixed precision by it. 6: chat template of a file, ignored fields.
# What an older one described reads the same.
SCHEMA_VERSION = 6
HASHED_AT_LOAD_BYTES = 16 * 2**20  # smaller files are hashed at every load; of larger ones only the size is checked
MAX_MANIFEST_BYTES = 4 * 2**20
_CHECKSUM = re.compile(rb'("checksum": ")([0-9a-f]{64})(")')

PositiveInt = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
ByteCount = Annotated[int, msgspec.Meta(ge=0, le=2**50)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**24)]
ArtifactFormat = Literal["openvino", "onnx"]
GraphKind = Literal["fused", "plain"]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
FieldName = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
TagText = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Verified = Literal["run", "read", "no", "failed"]
Probability = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Ranges = Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$", max_length=2048)]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of the artifact: size in bytes and SHA-256 in lower-case hex."""

    size: ByteCount
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights came from.

    Attributes:
        kind: "hub", "folder", "gguf" or "package".
        id: hub repository, or the folder's or file's own name (never a path of the exporting machine).
        revision: commit hash on the hub, package version, or None.
        files: SHA-256 of every weight and configuration file that was read, by name.
    """

    kind: Literal["hub", "folder", "gguf", "package"]
    id: str
    revision: str | None
    files: dict[str, Sha256]


@dataclass(frozen=True, slots=True)
class Architecture:
    """The model's shape, as read from its config.json.

    Attributes:
        positions: "rotary" turns queries and keys by an angle; "alibi" adds a bias that falls with the distance.
    """

    name: str
    model_type: str
    hidden_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    feed_forward: PositiveInt
    vocabulary: PositiveInt
    sliding_window: PositiveInt | None
    tied_embeddings: bool
    parameters: PositiveInt
    positions: Literal["rotary", "alibi"] = "rotary"

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token adds to the KV cache, keys and values of all layers together."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class RecipeRecord:
    """How the weights were stored; what means nothing for a weight format is None.

    Attributes:
        group_size: weights that share one scale; -1 is one scale per output channel.
        ratio: share of the layers' weights in int4. The others take `backup`; with the recipes balanced and best, 8
            bits without zero points, in groups of `group_size`.
        backup: precision of what is not int4.
        output_layer_bits: bits of the output layer (and of a tied embedding).
        graph: of ONNX: "fused" has onnxruntime's own operators for attention and rounded weights, "plain" only those of
            the standard.
        recipe: how the layers' matrices were rounded: "fast" to nearest; "balanced" with scales searched, "best" with
            GPTQ as well, both on our texts.
        calibration_sha256, calibration_tokens: of those texts; None where nothing was calibrated.
        eight_bits: where the recipes balanced and best mix, which layers' matrices have 8 bits, by the matrices' name
            inside a layer: {"mlp.down_proj": "0-3,7"}.
    """

    weights: Literal["int4", "int8", "fp16", "fp32"]
    symmetric: bool | None = None
    group_size: Annotated[int, msgspec.Meta(ge=-1, le=2**40)] | None = None
    ratio: Probability | None = None
    backup: str | None = None
    output_layer_bits: Annotated[int, msgspec.Meta(ge=1, le=64)] | None = None
    graph: GraphKind | None = None
    recipe: Literal["fast", "balanced", "best"] | None = None
    calibration_sha256: Sha256 | None = None
    calibration_tokens: PositiveInt | None = None
    eight_bits: dict[str, Ranges] | None = None


@dataclass(frozen=True, slots=True)
class Template:
    """The chat template.

    Attributes:
        text: jinja2 source.
        origin: "checkpoint", "file" when the user gave one, or "built-in" when a chat model shipped none.
        bos_token, eos_token, pad_token, unk_token: what the template sees under these names.
        sha256: of the user's file.
        other_tokens: further special tokens that it sees, by the names of transformers' special_tokens_map: sep_token,
            additional_special_tokens, image_token and so on.
    """

    text: str
    origin: Literal["checkpoint", "built-in", "file"]
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    sha256: Sha256 | None = None
    other_tokens: dict[str, str | tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The authors' sampling settings (generation_config.json); None where they say nothing."""

    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] | None = None
    top_k: Count | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] | None = None
    max_new_tokens: PositiveInt | None = None


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The tags between which a thinking model reasons before it answers.

    Attributes:
        open, close: the tags as text.
        open_id, close_id: their token ids, or None for both when they are not added tokens of the vocabulary and are
            spelled with ordinary ones.
    """

    open: TagText
    close: TagText
    open_id: TokenId | None = None
    close_id: TokenId | None = None

    def __post_init__(self) -> None:
        if (self.open_id is None) != (self.close_id is None):
            raise ValueError("either both tags of the reasoning are tokens or none is")
        if self.open == self.close or (self.open_id is not None and self.open_id == self.close_id):
            raise ValueError(f"the reasoning opens and closes with the same tag {self.open!r}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything the runtime needs to know of an artifact.

    Attributes:
        role: "chat" or "base".
        context_length: the most tokens that prompt and answer may take together.
        stop_token_ids: the union of what the checkpoint's files call end of sequence.
        bos_token_id: the beginning-of-sequence id, or None.
        adds_bos: whether the tokenizer's own post-processor puts it in front of plain text.
        template: the chat template; None for a base model.
        files: every file of the artifact except this one, by name.
        tools: versions of the packages that made it.
        quality: figures measured at export, or None when nothing was measured.
        verified: at export: "run" and compared with the checkpoint; only "read", being too large to run there; "no", as
            the user asked; "failed", and kept all the same. None: made before this was recorded.
        notes: what the exporter decided or found that the user should see.
        reasoning: how a thinking model marks its reasoning; None for other models.
        ignored_fields: fields of the checkpoint's files that may change what the model computes, and were ignored as
            the user asked.
        added_tokens: tokens that were added to the checkpoint's tokenizer.json, because they stood in other files only.
    """

    format: ArtifactFormat
    created: str
    source: Source
    role: Literal["chat", "base"]
    architecture: Architecture
    context_length: PositiveInt
    recipe: RecipeRecord
    stop_token_ids: Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1, max_length=64)]
    bos_token_id: TokenId | None
    adds_bos: bool
    template: Template | None
    sampling: SamplingDefaults
    files: dict[str, FileRecord]
    tools: dict[str, str]
    quality: dict[str, float] | None = None
    notes: tuple[str, ...] = ()
    verified: Verified | None = None
    reasoning: ReasoningMarkers | None = None
    ignored_fields: tuple[FieldName, ...] = ()
    added_tokens: tuple[str, ...] = ()
    schema_version: PositiveInt = field(default=SCHEMA_VERSION, kw_only=True)

    def __post_init__(self) -> None:
        for name in self.files:
            _require_plain_name(name)
        tags = () if self.reasoning is None else (self.reasoning.open_id, self.reasoning.close_id)
        named = (*self.stop_token_ids, self.bos_token_id, *tags)
        too_large = [i for i in named if i is not None and i >= self.architecture.vocabulary]
        if too_large:
            raise ValueError(f"token ids {too_large} lie outside the vocabulary of {self.architecture.vocabulary}")

    @property
    def sha256(self) -> str:
        """SHA-256 of the serialised manifest, which holds the digests of all files."""
        return hashlib.sha256(serialise_manifest(self)).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Size of all files, without the manifest."""
        return sum(record.size for record in self.files.values())


def read_manifest(folder: Path) -> Manifest:
    """Read and check `normistral.json` of an artifact folder; the other files are not touched.

    Raises:
        ArtifactError: the file is missing, damaged, or of a newer schema.
    """
    path = folder / MANIFEST_NAME
    try:
        if path.is_symlink() or not path.is_file():
            raise ArtifactError(
                f"{folder} has no {MANIFEST_NAME}: it is not a whole artifact",
                "make one with: normistral export MODEL OUTPUT",
            )
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes", EXPORT_AGAIN)
        raw = path.read_bytes()
    except OSError as exc:
        raise ArtifactError(f"cannot read {path}: {exc.strerror}", "check the folder's permissions") from exc
    return parse_manifest(raw, str(path))


def parse_manifest(raw: bytes, name: str = MANIFEST_NAME) -> Manifest:
    """Decode a manifest's bytes; `name` is used in messages.

    Raises:
        ArtifactError: as `read_manifest`.
    """
    version = _schema_version(raw)
    if version is not None and version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{name} has schema {version}; this version of normistral reads up to {SCHEMA_VERSION}",
            UPGRADE,
        )
    found = _CHECKSUM.search(raw)
    if found is None or found[2].decode() != _checksum(raw):
        raise ArtifactError(f"{name} was changed after the export (its checksum does not match)", EXPORT_AGAIN)
    try:
        document = msgspec.json.decode(raw)
        document.pop("checksum", None)
        manifest = msgspec.convert(document, Manifest)
        _require_known_fields(document, msgspec.to_builtins(manifest))
    except (msgspec.MsgspecError, ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise ArtifactError(f"{name} is not a valid manifest: {exc}", EXPORT_AGAIN) from exc
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `normistral.json`; the caller makes sure that the folder is otherwise complete."""
    (folder / MANIFEST_NAME).write_bytes(serialise_manifest(manifest))


def serialise_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON text with its checksum, in UTF-8."""
    document: dict[str, Any] = {"schema_version": manifest.schema_version, "checksum": "0" * 64}
    document |= {key: value for key, value in msgspec.to_builtins(manifest).items() if key != "schema_version"}
    raw = msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
    return _CHECKSUM.sub(rb"\g<1>" + _checksum(raw).encode() + rb"\g<3>", raw, count=1)


def hash_files(folder: Path, on_bytes: OnBytes = ignore_bytes) -> dict[str, FileRecord]:
    """Size and SHA-256 of every file in `folder` except the manifest, by name. An artifact has no subfolders.

    Args:
        on_bytes: called with the number of bytes just read, for a progress bar.
    """
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST_NAME)
    return {path.name: FileRecord(path.stat().st_size, sha256_file(path, on_bytes)) for path in files}


def check_files(folder: Path, manifest: Manifest, *, thorough: bool) -> None:
    """Compare the artifact's files with the manifest.

    Args:
        thorough: hash every file; otherwise only those under 16 MiB, and compare the size of the rest.

    Raises:
        ArtifactError: naming the first file that is missing, truncated or changed.
    """
    problem = next(find_problems(folder, manifest, thorough=thorough), None)
    if problem is not None:
        raise ArtifactError(problem, EXPORT_AGAIN)


def find_problems(
    folder: Path, manifest: Manifest, *, thorough: bool, on_bytes: OnBytes = ignore_bytes
) -> Iterator[str]:
    """Every file of the manifest that is missing, truncated or changed, one line each."""
    for name, record in manifest.files.items():
        path = folder / name
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                yield f"{path} is not a regular file"
            elif status.st_size != record.size:
                yield f"{path} has {status.st_size} bytes instead of {record.size}"
            elif (thorough or record.size < HASHED_AT_LOAD_BYTES) and sha256_file(path, on_bytes) != record.sha256:
                yield f"{path} was changed after the export (its SHA-256 does not match)"
        except FileNotFoundError:
            yield f"{path} is missing"
        except OSError as exc:
            yield f"{path} cannot be read: {exc.strerror}"


def _checksum(raw: bytes) -> str:
    return hashlib.sha256(_CHECKSUM.sub(rb"\g<1>" + b"0" * 64 + rb"\g<3>", raw, count=1)).hexdigest()


def _schema_version(raw: bytes) -> int | None:
    """The schema version alone, so that a newer file is called newer and not broken."""

    class Head(msgspec.Struct):
        schema_version: int

    try:
        return msgspec.json.decode(raw, type=Head).schema_version
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def _require_known_fields(given: Any, known: Any) -> None:
    """Refuse fields that this version does not know; msgspec lets them pass for dataclasses."""
    if isinstance(given, dict):
        if unknown := sorted(given.keys() - known.keys()):
            raise ValueError(f"unknown field {', '.join(unknown)}")
        for key, value in given.items():
            _require_known_fields(value, known[key])


def _require_plain_name(name: str) -> None:
    """Refuse names that would lead out of the artifact's folder, on any operating system."""
    if name in ("", ".", "..") or set(name) & {"/", "\\", ":", "\x00"}:
        raise ValueError(f"file name {name!r} is not a plain name")
