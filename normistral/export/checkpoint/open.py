"""Open a located model: check all of it, gather the facts the manifest needs, and lay out a safe view of it.

The view is a folder that transformers and optimum may load: config.json and generation_config.json written anew from
checked fields, links to the weights, the tokenizer's own files. What the authors' files say wins over presets, and
where they contradict each other the rules stand beside the functions below.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from normistral.artifact.manifest import Architecture, ReasoningMarkers, SamplingDefaults, Source, Template
from normistral.artifact.presets import Preset, Role
from normistral.artifact.tokenizer import TOKENIZER_NAME, Tokenizer
from normistral.errors import CheckpointError, ResourceError
from normistral.export.checkpoint.chat_templates import TemplateFile, override_template, require_template, try_template
from normistral.export.checkpoint.families import find_family, sanitise_config
from normistral.export.checkpoint.families.base import Family
from normistral.export.checkpoint.fields import FOLLOW_LINKS, IgnoredFields, check_fields, read_token_ids
from normistral.export.checkpoint.files import read_json, refuse_other_models, write_json
from normistral.export.checkpoint.generation_config import GENERATION_FIELDS, read_sampling_defaults
from normistral.export.checkpoint.gguf import convert_gguf
from normistral.export.checkpoint.gguf_file import gguf_parts
from normistral.export.checkpoint.locate import Located
from normistral.export.checkpoint.tensor import Dtype, Tensor
from normistral.export.checkpoint.tokenizer_check import verify_template, verify_tokenizer
from normistral.export.checkpoint.tokenizer_files import TOKENIZER_FILES, lay_out_tokenizer, link_or_copy
from normistral.export.checkpoint.vocabulary import (
    Vocabulary,
    complete_tokenizer,
    load_backend,
    load_tokenizer,
    read_vocabulary,
)
from normistral.export.checkpoint.weights import (
    WeightFiles,
    check_tensors,
    find_weight_files,
    has_separate_output,
    read_tensors,
    stored_dtype,
    with_prefix,
)
from normistral.files import sha256_file
from normistral.progress import OnBytes, Progress, ignore_bytes

_AGAIN = "download or copy the checkpoint again"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointText:
    """A checkpoint without its weights: what turns text into tokens and ends an answer, verified.

    Attributes:
        folder: the view for transformers and optimum (local_files_only, no remote code); the weights come last.
        family: of the architecture.
        config: sanitised config.json.
        raw_config: config.json as it was given, less what `ignored_fields` names: the verification measures by it.
        ignored_fields: accepted knowingly, although they may change what the model computes.
        tokenizer: the checkpoint's in transformers, from all its files.
        added_tokens: tokens that were added to tokenizer.json, because they stood only in other files.
        stop_token_ids: every id that a file calls end of sequence, sorted.
        adds_bos: measured: whether encoding plain text puts `bos_token_id` in front.
        reasoning: the tags of a thinking model, or None.
        checks: figures of the comparison of tokenizer and template with transformers.
        notes: for the user.
    """

    folder: Path
    family: Family
    config: dict[str, Any]
    raw_config: dict[str, Any]
    ignored_fields: tuple[str, ...]
    tokenizer: Any
    added_tokens: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    bos_token_id: int | None
    adds_bos: bool
    template: Template | None
    sampling: SamplingDefaults
    reasoning: ReasoningMarkers | None
    checks: dict[str, float]
    notes: tuple[str, ...]

    @property
    def role(self) -> Role:
        """ "chat" with a chat template, else "base"."""
        return "base" if self.template is None else "chat"

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """Files of the tokenizer that belong into an artifact."""
        return tuple(self.folder / name for name in TOKENIZER_FILES if (self.folder / name).exists())


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(CheckpointText):
    """A checked model, ready to be converted.

    Attributes:
        source: origin; `files` has the small files, and what was hashed on the way. `hash_sources` completes it.
        unhashed: weight files that are not in `source.files` yet, by the name they get there.
        architecture: shape and size.
        context_length: positions in tokens; None where no file gives any (ALiBi needs none).
        tensors: headers of the stored tensors, by the names of the causal language model; read once.
        tensor_shapes: of the weights that config.json describes, by the same names.
        has_output_layer: whether the weights hold an output matrix that differs from the embedding.
        dtype: type that most of the weights are stored in.
    """

    source: Source
    unhashed: tuple[tuple[str, Path], ...]
    architecture: Architecture
    context_length: int | None
    tensors: dict[str, Tensor]
    tensor_shapes: dict[str, tuple[int, ...]]
    has_output_layer: bool
    dtype: Dtype

    @property
    def weight_bytes(self) -> int:
        """Size of the stored weights."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


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
            text = _open_text(located, located.path, workspace, ignored, chat_template, progress)
            return _open_weights(located, located.path, text, progress)
        unpacked, texts = workspace / "unpacked", []

        def open_text(folder: Path) -> None:
            texts.append(_open_text(located, folder, workspace, ignored, chat_template, progress))

        notes = convert_gguf(located.path, unpacked, ignored, before_weights=open_text, progress=progress)
        checkpoint = _open_weights(located, unpacked, replace(texts[0], notes=(*notes, *texts[0].notes)), progress)
        parts = tuple((part.name, part) for part in gguf_parts(located.path))
        return replace(checkpoint, source=replace(checkpoint.source, files={}), unhashed=parts)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk of {workspace} is full", "free some space, or write elsewhere") from exc
        raise CheckpointError(
            f"cannot read {exc.filename or located.path}: {exc.strerror}", "check the folder's permissions"
        ) from exc


def hash_sources(checkpoint: Checkpoint, on_bytes: OnBytes = ignore_bytes) -> Source:
    """The origin with the SHA-256 of every file that was read.

    Reads all weights once, 14.5 GB for a 7B: run it in a thread beside the conversion, hashlib releases the GIL. Files
    of a hub download were hashed there and are not read again.

    Args:
        on_bytes: called with the number of bytes just read.
    """
    hashes = {name: sha256_file(path, on_bytes) for name, path in checkpoint.unhashed}
    return replace(checkpoint.source, files=dict(sorted({**checkpoint.source.files, **hashes}.items())))


def _open_text(
    located: Located,
    folder: Path,
    workspace: Path,
    ignored: IgnoredFields,
    given: TemplateFile | None,
    progress: Progress,
) -> CheckpointText:
    """Read and verify everything but the weights; their tensor headers are not read either."""
    notes: list[str] = []
    with progress.stage("Checking tokenizer and template"):
        family, raw_config, config = _read_config(folder, located.preset, ignored, notes)
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            _require_inside(folder, name)
        generation = _read_generation(folder, raw_config, ignored)
        ignored.require_found()
        notes += [
            f"the field {name} is ignored, as asked: it may change what the model computes" for name in ignored.names
        ]
        if located.kind not in ("gguf", "package"):
            find_weight_files(folder)  # without any, nothing else matters
        view = workspace / "checkpoint"
        view.mkdir(parents=True)
        lay_out_tokenizer(folder, view, raw_config, family.model_type, notes)
        if given is not None:
            override_template(view, given)
        else:
            require_template(view, folder, notes)
        tokenizer = load_tokenizer(view)
        added = complete_tokenizer(view, tokenizer, notes)
        ours = Tokenizer(load_backend(view / TOKENIZER_NAME))
        vocabulary = read_vocabulary(view, ours, tokenizer, config["bos_token_id"], config["vocab_size"])
        stops = _stop_token_ids(config, generation, vocabulary)
        template = _choose_template(vocabulary, located.preset, given, notes)
        sampling = read_sampling_defaults(generation, notes.append)
        write_json(view / "generation_config.json", _generation_config(config, vocabulary.bos_id, stops, sampling))
        if sampling.max_new_tokens is None and located.preset is not None:
            sampling = replace(sampling, max_new_tokens=located.preset.max_new_tokens)
        checks = {"tokenizer_tokens": float(verify_tokenizer(view, ours, tokenizer)), "template_conversations": 0.0}
        if template is not None:
            compiled = try_template(template, ours, vocabulary.reasoning, None if given is None else given.name)
            if template.origin != "built-in":  # which the checkpoint does not have
                checks["template_conversations"] = float(verify_template(compiled, tokenizer))
    return CheckpointText(
        folder=view,
        family=family,
        config=config,
        raw_config=raw_config,
        ignored_fields=ignored.names,
        tokenizer=tokenizer,
        added_tokens=added,
        stop_token_ids=stops,
        bos_token_id=vocabulary.bos_id,
        adds_bos=vocabulary.adds_bos,
        template=template,
        sampling=sampling,
        reasoning=vocabulary.reasoning,
        checks=checks,
        notes=tuple(notes),
    )


def _open_weights(located: Located, folder: Path, text: CheckpointText, progress: Progress) -> Checkpoint:
    """Check the weights' headers against config.json, and complete the view."""
    family, config, notes = text.family, dict(text.config), list(text.notes)
    with progress.stage("Checking the checkpoint"):
        files = _find_own_weights(folder)
        stored = read_tensors(files)
        tensors = with_prefix(stored, family)
        has_output_layer = has_separate_output(tensors, family)
        if config["tie_word_embeddings"] and has_output_layer:
            if text.raw_config.get("tie_word_embeddings") is True:
                raise CheckpointError(
                    "config.json ties the output layer to the embedding, but the weights hold one that differs: "
                    "transformers 4 takes the embedding, transformers 5 the other",
                    "set tie_word_embeddings to what is meant",
                )
            config["tie_word_embeddings"] = False
            notes.append("the weights hold an output layer of their own: it is used, although config.json says nothing")
        tensor_shapes = family.tensor_shapes(config)
        check_tensors(stored, tensor_shapes, family)
        config["torch_dtype"] = dtype = stored_dtype(tensors)
        for name in (*files.names, *([files.index] if files.index is not None else [])):
            link_or_copy(folder / name, text.folder / name)
        write_json(text.folder / "config.json", config)
        source, unhashed = _origin(located, folder, files.names)
    for note in notes:
        progress.note(note)
    known = {field.name: getattr(text, field.name) for field in fields(text)}
    return Checkpoint(
        **known | {"config": config, "notes": tuple(notes)},
        source=source,
        unhashed=unhashed,
        architecture=family.architecture(config),
        context_length=family.context_length(config),
        tensors=tensors,
        tensor_shapes=tensor_shapes,
        has_output_layer=has_output_layer,
        dtype=dtype,
    )


def _read_config(
    folder: Path, preset: Preset | None, ignored: IgnoredFields, notes: list[str]
) -> tuple[Family, dict[str, Any], dict[str, Any]]:
    """The architecture's family; config.json as it was given, less what is ignored; and sanitised."""
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json", "give the folder of a transformers checkpoint")
    _require_inside(folder, "config.json")
    raw = read_json(folder / "config.json")
    refuse_other_models(folder, ignored.without(raw))
    family = find_family(raw)
    raw = ignored.take_from(raw, family.fields, "config.json")
    context = family.context_field
    if raw.get(context) is None and preset is not None and preset.context_length is not None:
        raw[context] = preset.context_length
        notes.append(f"config.json gives no context length; the preset's is used: {preset.context_length} tokens")
    if raw.get("auto_map") is not None:
        notes.append("the checkpoint comes with code of its own (auto_map), which is never run")
    config = sanitise_config(raw)
    rope = config.get("rope_scaling") or {}
    if rope.get("rope_type") == "dynamic":
        notes.append("rope_scaling dynamic changes nothing up to max_position_embeddings, and the context ends there")
    return family, raw, config


def _read_generation(folder: Path, raw_config: dict[str, Any], ignored: IgnoredFields) -> dict[str, Any]:
    """generation_config.json; without one the settings that stand in config.json, as transformers 4 takes them."""
    path = folder / "generation_config.json"
    if not path.exists():
        settings = {name: raw_config[name] for name in GENERATION_FIELDS if raw_config.get(name) is not None}
        check_fields(settings, GENERATION_FIELDS, "config.json")
        return settings
    generation = ignored.take_from(read_json(path), GENERATION_FIELDS, path.name)
    check_fields(generation, GENERATION_FIELDS, path.name)
    return generation


def _find_own_weights(folder: Path) -> WeightFiles:
    """The weight files, all of them inside the checkpoint."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        _require_inside(folder, index)
    files = find_weight_files(folder)
    for name in files.names:
        _require_inside(folder, name)
    return files


def _require_inside(folder: Path, name: str) -> None:
    """Refuse a file that is a link out of the checkpoint; a hub cache's links into its own blobs are meant."""
    path = folder / name
    if not path.is_symlink() and not path.exists():
        return
    try:
        target, root = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError) as exc:  # a dangling link, or a circle of them
        raise CheckpointError(f"{name} is a link to a file that is missing", FOLLOW_LINKS) from exc
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
    from normistral.artifact.chat_template import CHATML

    if vocabulary.template is None and (preset is None or preset.role != "chat"):
        return None
    if vocabulary.template is None:
        notes.append(
            "the checkpoint has no chat template: the built-in ChatML is used, which may not be what it learnt; "
            "--chat-template FILE gives another"
        )
    if given is not None:
        notes.append(f"the chat template is that of {ascii(given.name)[1:-1]}, as asked; the checkpoint's is not used")
    specials: dict[str, Any] = dict(vocabulary.specials)
    return Template(
        text=CHATML if vocabulary.template is None else vocabulary.template,
        origin="built-in" if vocabulary.template is None else "checkpoint" if given is None else "file",
        sha256=None if given is None else given.sha256,
        **{name: specials.pop(name, None) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
        other_tokens=specials,
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


def _origin(located: Located, folder: Path, weights: Sequence[str]) -> tuple[Source, tuple[tuple[str, Path], ...]]:
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
