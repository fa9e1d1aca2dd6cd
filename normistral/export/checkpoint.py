"""Open a located model: check all of it, gather the facts the manifest needs, and lay out a safe view of it.

The view is a folder that transformers and optimum may load: config.json and generation_config.json written anew from
checked fields, links to the weights, the tokenizer's own files. What the authors' files say wins over presets, and
where they contradict each other the rules stand beside the functions below.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normistral.errors import CheckpointError, ResourceError
from normistral.export.chat_templates import TemplateFile, override_template, try_template
from normistral.export.config import (
    architecture_of,
    context_of,
    drop_ignored,
    expected_tensors,
    read_json,
    sanitise_config,
)
from normistral.export.families import find_family
from normistral.export.families.base import Family
from normistral.export.fields import read_token_ids
from normistral.export.folder_kinds import refuse_other_models
from normistral.export.generation_fields import GENERATION_FIELDS
from normistral.export.gguf import convert_gguf
from normistral.export.gguf_file import gguf_parts
from normistral.export.known_fields import IgnoredFields, check_fields
from normistral.export.locate import Located
from normistral.export.progress import Progress
from normistral.export.sampling_defaults import read_sampling_defaults
from normistral.export.tensor import Dtype, Tensor
from normistral.export.vocabulary import TOKENIZER_FILES, Vocabulary, convert_sentencepiece, read_vocabulary
from normistral.export.weights import (
    check_tensors,
    has_separate_output,
    read_tensors,
    stored_dtype,
    weight_files,
)
from normistral.manifest import Architecture, ReasoningMarkers, SamplingDefaults, Source, Template, sha256_file
from normistral.presets import Preset, Role

_AGAIN = "download or copy the checkpoint again"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked model, ready to be converted.

    Attributes:
        folder: the view for transformers and optimum (local_files_only, no remote code).
        source: origin; `files` has the small files, and what was hashed on the way. `hash_sources` completes it.
        unhashed: weight files that are not in `source.files` yet, by the name they get there.
        family: of the architecture; `config`: sanitised config.json.
        raw_config: config.json as it was given, less what `ignored_fields` names: what the proof measures by.
        ignored_fields: accepted knowingly, although they may change what the model computes.
        dtype: type of the stored weights; `weight_bytes` is their size.
        tokenizer_files: to be shipped byte for byte.
        context_length: positions in tokens; None where no file gives any (ALiBi needs none).
        stop_token_ids: every id that a file calls end of sequence, sorted.
        adds_bos: measured: whether encoding plain text puts `bos_token_id` in front.
        reasoning: the tags of a thinking model, or None.
        notes: what the user should see.
    """

    folder: Path
    source: Source
    unhashed: tuple[tuple[str, Path], ...]
    family: Family
    config: dict[str, Any]
    raw_config: dict[str, Any]
    ignored_fields: tuple[str, ...]
    architecture: Architecture
    role: Role
    dtype: Dtype
    weight_bytes: int
    tokenizer_files: tuple[Path, ...]
    context_length: int | None
    stop_token_ids: tuple[int, ...]
    bos_token_id: int | None
    adds_bos: bool
    template: Template | None
    sampling: SamplingDefaults
    reasoning: ReasoningMarkers | None
    notes: tuple[str, ...]


def open_checkpoint(
    located: Located,
    workspace: Path,
    *,
    progress: Progress,
    chat_template: TemplateFile | None = None,
    ignore_fields: Sequence[str] = (),
) -> Checkpoint:
    """Check a model and lay out its view in `workspace`/checkpoint. No code of the checkpoint is run.

    Args:
        workspace: an existing folder on the disk of the artifact; a .gguf file is unpacked there to float32.
        chat_template: takes the place of the checkpoint's own.
        ignore_fields: fields of config.json and generation_config.json, or keys of a .gguf file, that would be refused.

    Raises:
        UsageError: a field to ignore is not there, or is read.
        CheckpointError: something is missing, damaged or inconsistent.
        UnsupportedArchitectureError: not a model that can be exported.
        ResourceError: the disk is full, or a .gguf file's float copy fits neither memory nor disk.
    """
    ignored = IgnoredFields(tuple(dict.fromkeys(ignore_fields)))
    try:
        if located.kind not in ("gguf", "package"):
            return _open_folder(located, located.path, workspace, (), ignored, progress, chat_template)
        unpacked = workspace / "unpacked"
        notes = convert_gguf(located.path, unpacked, ignored, progress=progress)
        checkpoint = _open_folder(located, unpacked, workspace, notes, ignored, progress, chat_template)
        parts = tuple((part.name, part) for part in gguf_parts(located.path))
        return replace(checkpoint, source=replace(checkpoint.source, files={}), unhashed=parts)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk of {workspace} is full", "free some space, or write elsewhere") from exc
        raise CheckpointError(
            f"cannot read {exc.filename or located.path}: {exc.strerror}", "check the folder's permissions"
        ) from exc


def hash_sources(checkpoint: Checkpoint, on_bytes: Callable[[int], None] = lambda count: None) -> Source:
    """The origin with the SHA-256 of every file that was read.

    Reads all weights once, 14.5 GB for a 7B: run it in a thread beside the conversion, hashlib releases the GIL. Files
    of a hub download were hashed there and are not read again.

    Args:
        on_bytes: called with the number of bytes just read.
    """
    hashes = {name: sha256_file(path, on_bytes) for name, path in checkpoint.unhashed}
    return replace(checkpoint.source, files=dict(sorted({**checkpoint.source.files, **hashes}.items())))


def _open_folder(
    located: Located,
    folder: Path,
    workspace: Path,
    notes: tuple[str, ...],
    ignored: IgnoredFields,
    progress: Progress,
    chat_template: TemplateFile | None,
) -> Checkpoint:
    found = list(notes)
    with progress.stage("Checking the checkpoint"):
        raw_config, config = _read_config(folder, located.preset, ignored, found)
        generation = _read_generation(folder, raw_config, ignored)
        ignored.require_found()
        found += [
            f"the field {name} is ignored, as asked: it may change what the model computes" for name in ignored.names
        ]
        tensors = _check_weights(folder, config, raw_config.get("tie_word_embeddings"), found)
        view = _lay_out(folder, workspace / "checkpoint", config, found)
        if chat_template is not None:
            override_template(view, chat_template)
        vocabulary = read_vocabulary(view, config["bos_token_id"])
        if vocabulary.largest_id >= config["vocab_size"]:
            raise CheckpointError(
                f"the tokenizer does not fit the model: its ids run to {vocabulary.largest_id}, "
                f"but config.json has vocab_size {config['vocab_size']}",
                "the tokenizer and the weights belong to different models",
            )
        stops = _stop_token_ids(config, generation, vocabulary)
        template = _choose_template(vocabulary, located.preset, chat_template, found)
        if template is not None:
            file = None if chat_template is None else chat_template.name
            try_template(template, view, vocabulary.reasoning, file)
        sampling = read_sampling_defaults(generation, found.append)
        _write_json(view / "generation_config.json", _generation_config(config, vocabulary.bos_id, stops, sampling))
        weights, _ = weight_files(folder)
        source, unhashed = _origin(located, folder, weights)
    for note in found:
        progress.note(note)
    return Checkpoint(
        folder=view,
        source=source,
        unhashed=unhashed,
        family=find_family(config),
        config=config,
        raw_config=raw_config,
        ignored_fields=ignored.names,
        architecture=architecture_of(config),
        role="chat" if template is not None else "base",
        dtype=stored_dtype(tensors),
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        tokenizer_files=tuple(view / name for name in TOKENIZER_FILES if (view / name).exists()),
        context_length=context_of(config),
        stop_token_ids=stops,
        bos_token_id=vocabulary.bos_id,
        adds_bos=vocabulary.adds_bos,
        template=template,
        sampling=sampling,
        reasoning=vocabulary.reasoning,
        notes=tuple(found),
    )


def _read_config(
    folder: Path, preset: Preset | None, ignored: IgnoredFields, notes: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json as it was given, less what is ignored, and sanitised."""
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json", "give the folder of a transformers checkpoint")
    _require_inside(folder, "config.json")
    raw = read_json(folder / "config.json")
    refuse_other_models(folder, raw)
    raw = drop_ignored(raw, ignored)
    context = find_family(raw).context_field
    if raw.get(context) is None and preset is not None and preset.context_length is not None:
        raw[context] = preset.context_length
        notes.append(f"config.json gives no context length; the preset's is used: {preset.context_length} tokens")
    if raw.get("auto_map") is not None:
        notes.append("the checkpoint comes with code of its own (auto_map), which is never run")
    config = sanitise_config(raw)
    rope = config.get("rope_scaling") or {}
    if rope.get("rope_type") == "dynamic":
        notes.append("rope_scaling dynamic changes nothing up to max_position_embeddings, and the context ends there")
    return raw, config


def _read_generation(folder: Path, raw_config: dict[str, Any], ignored: IgnoredFields) -> dict[str, Any]:
    """generation_config.json; without one the settings that stand in config.json, as transformers 4 takes them."""
    path = folder / "generation_config.json"
    if not path.exists():
        settings = {name: raw_config[name] for name in GENERATION_FIELDS if raw_config.get(name) is not None}
        check_fields(settings, GENERATION_FIELDS, "config.json")
        return settings
    _require_inside(folder, path.name)
    generation = ignored.take_from(read_json(path), GENERATION_FIELDS, path.name)
    check_fields(generation, GENERATION_FIELDS, path.name)
    return generation


def _check_weights(folder: Path, config: dict[str, Any], tied: bool | None, notes: list[str]) -> dict[str, Tensor]:
    """Headers against config.json; sets the stored type, and unties an output layer that the weights hold apart.

    Args:
        tied: what the file says of the output layer; None where it says nothing.
    """
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        _require_inside(folder, index)
    files, _ = weight_files(folder)
    for name in files:
        _require_inside(folder, name)
    tensors, family = read_tensors(folder), find_family(config)
    if config["tie_word_embeddings"] and has_separate_output(tensors, family):
        if tied is True:
            raise CheckpointError(
                "config.json ties the output layer to the embedding, but the weights hold one that differs: "
                "transformers 4 takes the embedding, transformers 5 the other",
                "set tie_word_embeddings to what is meant",
            )
        config["tie_word_embeddings"] = False
        notes.append("the weights hold an output layer of their own: it is used, although config.json says nothing")
    check_tensors(tensors, expected_tensors(config), family)
    config["torch_dtype"] = stored_dtype(tensors)
    return tensors


def _lay_out(folder: Path, view: Path, config: dict[str, Any], notes: list[str]) -> Path:
    view.mkdir(parents=True)
    _write_json(view / "config.json", config)
    files, weight_map = weight_files(folder)
    names = [*files, *TOKENIZER_FILES, "generation_config.json"]
    if weight_map is not None:
        suffix = files[0].rpartition(".")[2]
        names.append("model.safetensors.index.json" if suffix == "safetensors" else "pytorch_model.bin.index.json")
    for name in names:
        _require_inside(folder, name)
        if not (folder / name).exists():
            continue
        if name == "generation_config.json":  # read here, and replaced by a checked one
            shutil.copyfile(folder / name, view / name)
        else:
            _link(folder / name, view / name)
    _drop_tokenizer_code(view, notes)
    if not (view / "tokenizer.json").exists():
        if not (view / "tokenizer.model").exists():
            raise CheckpointError(
                f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model",
                "copy the tokenizer's files beside config.json",
            )
        convert_sentencepiece(view)
        notes.append("tokenizer.json was made from tokenizer.model")
    return view


def _link(source: Path, target: Path) -> None:
    """A symbolic link, or a copy where the file system has none."""
    try:
        target.symlink_to(source.resolve())
    except (OSError, NotImplementedError):
        shutil.copyfile(source, target)


def _drop_tokenizer_code(view: Path, notes: list[str]) -> None:
    path = view / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    if "auto_map" in settings:
        path.unlink()
        _write_json(path, {key: value for key, value in settings.items() if key != "auto_map"})
        notes.append("the tokenizer comes with code of its own (auto_map), which is never run")


def _require_inside(folder: Path, name: str) -> None:
    """Refuse a file that is a link out of the checkpoint; a hub cache's links into its own blobs are meant."""
    path = folder / name
    if not path.is_symlink() and not path.exists():
        return
    try:
        target, root = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError) as exc:  # a dangling link, or a circle of them
        raise CheckpointError(f"{name} is a link to a file that is missing", _AGAIN) from exc
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise CheckpointError(f"{name} is a link that leads out of {folder}", "replace the link by the file itself")
    if not target.is_file():
        raise CheckpointError(f"{name} is not a regular file", _AGAIN)


def _stop_token_ids(config: dict[str, Any], generation: dict[str, Any], vocabulary: Vocabulary) -> tuple[int, ...]:
    """Union over all files: NorMistral's name different tokens, and stopping on config.json's alone never stops."""
    ids = set(config["eos_token_id"] or []) | set(vocabulary.eos_ids)
    ids |= set(read_token_ids(generation, "eos_token_id", config["vocab_size"], "generation_config.json"))
    if not ids:
        raise CheckpointError(
            "no file of the checkpoint names an end-of-sequence token", "set eos_token_id in generation_config.json"
        )
    if len(ids) > 64:
        raise CheckpointError(f"the checkpoint names {len(ids)} end-of-sequence tokens", _AGAIN)
    return tuple(sorted(ids))


def _choose_template(
    vocabulary: Vocabulary, preset: Preset | None, given: TemplateFile | None, notes: list[str]
) -> Template | None:
    from normistral.runtime.template import CHATML

    if vocabulary.template is None and (preset is None or preset.role != "chat"):
        return None
    if vocabulary.template is None:
        notes.append(
            "the checkpoint has no chat template: the built-in ChatML is used, which may not be what it learnt; "
            "--chat-template FILE gives another"
        )
    if given is not None:
        notes.append(f"the chat template is that of {ascii(given.name)[1:-1]}, as asked; the checkpoint's is not used")
    specials = vocabulary.specials
    return Template(
        text=CHATML if vocabulary.template is None else vocabulary.template,
        origin="built-in" if vocabulary.template is None else "checkpoint" if given is None else "file",
        sha256=None if given is None else given.sha256,
        bos_token=specials.get("bos_token"),
        eos_token=specials.get("eos_token"),
        pad_token=specials.get("pad_token"),
        unk_token=specials.get("unk_token"),
    )


def _generation_config(
    config: dict[str, Any], bos: int | None, stops: tuple[int, ...], sampling: SamplingDefaults
) -> dict[str, Any]:
    """generation_config.json for other loaders, with all stop ids, and `do_sample` where the authors wrote `sample`."""
    document: dict[str, Any] = {
        "bos_token_id": bos,
        "eos_token_id": list(stops),
        "pad_token_id": config["pad_token_id"],
    }
    if sampling.temperature:
        document |= {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
        document |= {"top_p": sampling.top_p, "min_p": sampling.min_p}
    document |= {"repetition_penalty": sampling.repetition_penalty, "max_new_tokens": sampling.max_new_tokens}
    return {key: value for key, value in document.items() if value is not None}


def _origin(located: Located, folder: Path, weights: list[str]) -> tuple[Source, tuple[tuple[str, Path], ...]]:
    small = [path.name for path in folder.iterdir() if path.suffix == ".json" or path.name in TOKENIZER_FILES]
    hashes: dict[str, str] = {}
    for name in sorted({*small, *weights}):
        if name in located.hashes:
            hashes[name] = located.hashes[name]
        elif name not in weights and (folder / name).is_file():
            _require_inside(folder, name)
            hashes[name] = sha256_file(folder / name)
    unhashed = tuple((name, folder / name) for name in weights if name not in hashes)
    return Source(kind=located.kind, id=located.id, revision=located.revision, files=hashes), unhashed


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
