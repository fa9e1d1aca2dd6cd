"""Source of a model's chat template, the user's file or the checkpoint, and a trial rendering.

A template is jinja2 source. Ollama's are in Go's template language, and stand in published .gguf files all the same:
they are recognised and refused, as llama.cpp fails on them too.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.manifest import ReasoningMarkers, Template
from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import CheckpointError, TemplateError, UsageError
from normistral.export.checkpoint.files import read_optional_json, recognise, write_json
from normistral.files import explain, read_input

TEMPLATE_NAME = "chat_template.jinja"
FURTHER_TEMPLATES = "additional_chat_templates"  # a folder of transformers 4.51 and later: NAME.jinja
_MAX_CHARACTERS = 256 * 2**10
# What Go's text/template writes and jinja2 cannot read: {{ .Prompt }}, {{ if .System }}, {{ $last := 1 }}
_GO = re.compile(r"\{\{-?\s*(?:(?:else\s+)?(?:if|range|with)\s+[^}]*?[.$][A-Za-z_]|\.[A-Z]\w*|\$\w*\s*:=|\$\.)")
_PROBE = "Hva heter den lengste elva i Norge?"
_GIVE_ONE = "give one in jinja with --chat-template FILE"


@dataclass(frozen=True, slots=True)
class TemplateFile:
    """A chat template that the user gave: the file's name without its path, its text, SHA-256 of its bytes."""

    name: str
    text: str
    sha256: str


def read_template_file(path: Path) -> TemplateFile:
    """Read --chat-template FILE: jinja2 source in UTF-8; a byte order mark is dropped.

    Raises:
        UsageError: it cannot be read, is no text in UTF-8, too large, or is not a template in jinja.
    """
    try:
        raw = read_input(path, 4 * _MAX_CHARACTERS)
    except OSError as exc:
        raise UsageError(f"cannot read --chat-template {path}: {explain(exc)[0]}", "give a file that is there") from exc
    found = recognise(path, text=True)
    if found is not None:
        raise UsageError(f"--chat-template {path} is {found.what}", found.hint)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise UsageError(f"--chat-template {path} is not UTF-8 at byte {exc.start}", "save it as UTF-8") from exc
    if len(text) > _MAX_CHARACTERS:
        raise UsageError(
            f"--chat-template {path} is larger than {_MAX_CHARACTERS} characters", "give the chat template's file"
        )
    if _is_json(text):
        raise UsageError(
            f"--chat-template {path} is JSON, not jinja",
            "put the text of its chat_template into a file of its own, with line ends in place of \\n",
        )
    if is_go_template(text):
        raise UsageError(
            f"--chat-template {path} is a template in Go's language, as Ollama writes them, not in jinja",
            "write it in jinja, as transformers reads it",
        )
    return TemplateFile(path.name, text, hashlib.sha256(raw).hexdigest())


def find_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The checkpoint's: chat_template.jinja, else tokenizer_config.json's; of several the one called "default".

    Args:
        settings: tokenizer_config.json.

    Raises:
        CheckpointError: it cannot be read, is in Go's language, or several are there and none is the default.
    """
    own_file = folder / TEMPLATE_NAME
    template: object = settings.get("chat_template")
    if own_file.exists():
        try:
            template = own_file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            found = recognise(own_file)
            reason = f"{TEMPLATE_NAME} cannot be read: {exc}" if found is None else f"{TEMPLATE_NAME} is {found.what}"
            raise CheckpointError(reason, f"copy the file again, or {_GIVE_ONE}") from exc
    elif isinstance(template, dict | list):
        template = _choose_default(template)
    if template is None or template == "":
        return None
    if not isinstance(template, str) or len(template) > _MAX_CHARACTERS:
        raise CheckpointError(
            f"the chat template is {ascii(template)[:40]}, not a text of at most {_MAX_CHARACTERS} characters",
            f"copy tokenizer_config.json again, or {_GIVE_ONE}",
        )
    if is_go_template(template):
        raise CheckpointError(
            "the checkpoint's chat template is in Go's language, as Ollama writes them, not in jinja", _GIVE_ONE
        )
    return template


def require_template(view: Path, folder: Path, notes: list[str]) -> None:
    """Refuse a template of an unreadable form before transformers fails on it with a message of its own.

    Templates beside the default one, which transformers takes by name, or for tools, are told in a note.

    Args:
        view: with the template's file, and tokenizer_config.json.
        folder: the checkpoint's own, which may have further templates in files.

    Raises:
        CheckpointError: as `find_template`; or there are files of templates, and none is the default.
    """
    settings = read_optional_json(view / "tokenizer_config.json")
    find_template(view, settings)
    further = {path.stem: None for path in sorted((folder / FURTHER_TEMPLATES).glob("*.jinja"))}
    if not (view / TEMPLATE_NAME).exists():
        if further:  # transformers then leaves tokenizer_config.json's aside
            _choose_default(further)
        further = _by_name(settings.get("chat_template"))
    if names := [ascii(name)[1:-1][:40] for name in further if name != "default"]:
        notes.append(f"of several chat templates the default one is used, not: {', '.join(names[:5])}")


def is_go_template(text: str) -> bool:
    """Whether a text is a template of Go's text/template, which Ollama uses."""
    return _GO.search(text) is not None


def try_template(
    template: Template, tokenizer: Tokenizer, reasoning: ReasoningMarkers | None, file: str | None
) -> ChatTemplate:
    """Compile a template and render one question with it, as the runtime will.

    Args:
        tokenizer: of the tokenizer.json that will be shipped.
        file: the name of --chat-template's FILE, or None for the checkpoint's own.

    Raises:
        UsageError: the file's cannot.
        CheckpointError: the checkpoint's cannot.
    """
    try:
        compiled = ChatTemplate(template, tokenizer, reasoning)
        text = compiled.render([{"role": "user", "content": _PROBE}])
    except TemplateError as exc:
        if file is not None:
            raise UsageError(f"--chat-template {file}: {exc.message}", "correct the template") from exc
        raise CheckpointError(exc.message, f"correct the checkpoint's chat template, or {_GIVE_ONE}") from exc
    if file is not None and _PROBE not in text:
        raise UsageError(
            f"--chat-template {file} does not write what a user says: it is no chat template",
            "give jinja that goes through `messages` and writes each one's role and content",
        )
    return compiled


def override_template(view: Path, given: TemplateFile) -> None:
    """Put the given template in the place of the checkpoint's own, in files that may be changed."""
    path = view / TEMPLATE_NAME
    path.unlink(missing_ok=True)
    path.write_text(given.text, encoding="utf-8", newline="")
    settings = view / "tokenizer_config.json"
    if "chat_template" in (document := read_optional_json(settings)):
        del document["chat_template"]
        write_json(settings, document)


def _choose_default(several: dict[Any, Any] | list[Any]) -> object:
    """The template called "default", as transformers takes it."""
    several = _by_name(several)
    if "default" in several:
        return several["default"]
    names = ", ".join(ascii(name)[:40] for name in list(several)[:3])
    raise CheckpointError(
        f"the checkpoint has several chat templates ({names or 'none with a name'}), but none is called default",
        f"put the one you want into {TEMPLATE_NAME}, or {_GIVE_ONE}",
    )


def _by_name(several: object) -> dict[Any, Any]:
    """tokenizer_config.json's chat_template, where it holds several: a dict, or a list of names and templates."""
    if isinstance(several, list):
        named = [item for item in several if isinstance(item, dict) and isinstance(item.get("name"), str)]
        return {item["name"]: item.get("template") for item in named}
    return several if isinstance(several, dict) else {}


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False
