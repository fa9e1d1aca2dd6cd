"""--chat-template FILE, and templates of a checkpoint that cannot be used."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tiny_gguf import byte_level_vocabulary, write_gguf
from tiny_models import TEMPLATE, THINKING_TEMPLATE, edit_json, make_llama, make_mistral

from normistral.artifact.manifest import read_manifest
from normistral.cli import main
from normistral.errors import CheckpointError, NormistralError, UsageError
from normistral.export.checkpoint.chat_templates import is_go_template, read_template_file
from normistral.export.checkpoint.files import read_json
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import Checkpoint, open_checkpoint
from normistral.progress import NoProgress

# After Ollama's published templates: what they have in common.
GO = """{{- if .System }}<system_prompt> {{ .System }}</system_prompt>{{ end }}
{{- range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}<instruction> {{ .Content }}</instruction>{{ end }}{{ end }}"""
SHORT_GO = "<s>{{ .Prompt }}"
OTHER = (
    "{% for message in messages %}{{ '[' + message.role + '] ' + message.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def opened(model: Path, workspace: Path, template: Path | None = None) -> Checkpoint:
    workspace.mkdir()
    located = locate(str(model), progress=NoProgress())
    given = None if template is None else read_template_file(template)
    return open_checkpoint(located, workspace, progress=NoProgress(), chat_template=given)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "base"])
def test_the_file_wins_over_the_checkpoint_and_makes_a_base_model_chat(tmp_path: Path, chat: bool) -> None:
    folder = make_mistral(tmp_path / "model", chat=chat, thinking=True)
    edit_json(folder / "generation_config.json", eos_token_id=2)
    edit_json(folder / "tokenizer_config.json", eos_token="</s>")
    file = write(tmp_path / "own.txt", b"\xef\xbb\xbf" + TEMPLATE.encode())
    checkpoint = opened(folder, tmp_path / "workspace", file)
    assert checkpoint.role == "chat"
    assert checkpoint.template is not None
    assert (checkpoint.template.text, checkpoint.template.origin) == (TEMPLATE, "file")
    assert checkpoint.template.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert 4 in checkpoint.stop_token_ids  # <|im_end|>, which only this template names
    assert (checkpoint.folder / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    assert "chat_template" not in read_json(checkpoint.folder / "tokenizer_config.json")
    assert any("own.txt" in note for note in checkpoint.notes)
    assert 4 not in opened(folder, tmp_path / "second").stop_token_ids


def test_an_artifact_records_proves_and_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_mistral(tmp_path / "model", head_dim=32)
    file = write(tmp_path / "own.jinja", OTHER)
    arguments = ["export", str(folder), str(tmp_path / "out"), "--format", "onnx", "--weights", "int8"]
    assert main([*arguments, "--chat-template", str(file)]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.template is not None
    assert (manifest.template.text, manifest.template.origin) == (OTHER, "file")
    assert manifest.quality is not None
    assert manifest.quality["template_conversations"] == 4  # compared with transformers, which reads it too
    capsys.readouterr()
    assert main(["info", str(tmp_path / "out")]) == 0
    digest = hashlib.sha256(OTHER.encode()).hexdigest()[:12]
    assert f"from a file given at export, SHA-256 {digest}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (None, "cannot read --chat-template", "give a file"),
        (b"", "is empty", "again"),
        (b"{{ '\xff' }}", "is not UTF-8 at byte 4", "UTF-8"),
        ("{{ messages }}".encode("utf-16"), "is a text in UTF-16", "UTF-8"),
        (b"<!doctype html><html>", "is a web page", "/resolve/"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 12\n", "is a pointer of Git LFS", "git lfs pull"),
        ('{"chat_template": "{{ messages[0].content }}"}', "is JSON, not jinja", "a file of its own"),
        (GO, "is a template in Go's language", "jinja"),
        (SHORT_GO, "is a template in Go's language", "jinja"),
        ("x" * (256 * 2**10 + 1), "is larger than 262144 characters", "chat template's file"),
        ("{% for m in messages %}{{ m.content }}", "own.jinja: the chat template has an error in line 1", "correct"),
        ("{{ messages[0].content.real }}{{ nothing.at_all }}", "own.jinja: the chat template uses", "correct"),
        ("{{ raise_exception('never') }}", "own.jinja: the chat template refuses the messages", "correct"),
        ("Hei!", "own.jinja does not write what a user says", "messages"),
    ],
)
def test_a_file_that_is_no_template_is_refused_by_name(
    tmp_path: Path, content: str | bytes | None, message: str, hint: str
) -> None:
    folder = make_mistral(tmp_path / "model")
    file = tmp_path / "own.jinja"
    if content is not None:
        write(file, content)
    with pytest.raises(UsageError) as caught:
        opened(folder, tmp_path / "workspace", file)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("place", ["gguf", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("template", [GO, SHORT_GO])
def test_a_go_template_is_named_and_a_file_helps(tmp_path: Path, place: str, template: str) -> None:
    folder = make_llama(tmp_path / "model")
    model = folder
    if place == "gguf":
        vocabulary = byte_level_vocabulary(folder) | {"template": template}
        vocabulary["tokens"][-1] = "ĠĠ"  # its one merge
        model = write_gguf(tmp_path / "model.gguf", folder, vocabulary)
    elif place == "tokenizer_config.json":
        edit_json(folder / place, chat_template=template)
    else:
        write(folder / place, template)
    with pytest.raises(CheckpointError, match="in Go's language, as Ollama writes them") as caught:
        opened(model, tmp_path / "workspace")
    assert "--chat-template FILE" in caught.value.hint
    checkpoint = opened(model, tmp_path / "second", write(tmp_path / "own.jinja", TEMPLATE))
    assert checkpoint.template is not None
    assert checkpoint.template.origin == "file"


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"default": {"a": 1}}, "the chat template is {'a': 1}, not a text"),
        ({"rag": "x", "tool_use": "y"}, r"several chat templates \('rag', 'tool_use'\), but none is called default"),
        (["x", "y"], r"several chat templates \(none with a name\), but none is called default"),
        (12, "the chat template is 12, not a text"),
        ("{% if %}", "the chat template has an error in line 1"),
        ("{{ nothing.at_all }}", "the chat template uses what is not there"),
    ],
)
def test_a_stored_template_that_cannot_be_used_offers_the_option(tmp_path: Path, stored: object, message: str) -> None:
    folder = make_mistral(tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", chat_template=stored)
    with pytest.raises(NormistralError, match=message) as caught:
        opened(folder, tmp_path / "workspace")
    assert "--chat-template FILE" in caught.value.hint
    assert opened(folder, tmp_path / "second", write(tmp_path / "own.jinja", OTHER)).role == "chat"


def test_a_dict_of_templates_has_a_default(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", chat_template={"default": OTHER, "tool_use": "x"})
    template = opened(folder, tmp_path / "workspace").template
    assert template is not None
    assert (template.text, template.origin) == (OTHER, "checkpoint")


def test_templates_in_a_folder_of_their_own_are_not_passed_over(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", chat=False)
    (folder / "additional_chat_templates").mkdir()
    write(folder / "additional_chat_templates" / "tool_use.jinja", OTHER)
    with pytest.raises(CheckpointError, match=r"several chat templates \('tool_use'\), but none is called default"):
        opened(folder, tmp_path / "a")
    assert opened(folder, tmp_path / "b", write(tmp_path / "own.jinja", TEMPLATE)).role == "chat"
    write(folder / "chat_template.jinja", TEMPLATE)
    assert "of several chat templates the default one is used, not: tool_use" in opened(folder, tmp_path / "c").notes


@pytest.mark.parametrize("template", [TEMPLATE, THINKING_TEMPLATE, OTHER, "{{ range(3) }}{{ iffy.x }}{{ with_x.y }}"])
def test_jinja_is_not_taken_for_go(template: str) -> None:
    assert not is_go_template(template)
