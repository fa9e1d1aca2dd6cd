"""A checkpoint's tokenizer is what transformers makes of all its files, or it is refused before a weight is read."""

from __future__ import annotations

import codecs
import json
import tempfile
from pathlib import Path
from typing import Any

import mutate_tokenizers
import pytest
import transformers
from tiny_models import TEMPLATE, VOCABULARY, edit_json, make_llama, make_mistral, write_json
from transformers import AutoTokenizer

from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import CheckpointError
from normistral.export.checkpoint import open as checkpoints
from normistral.export.checkpoint.files import read_json
from normistral.export.checkpoint.locate import Located
from normistral.export.checkpoint.open import Checkpoint, open_checkpoint
from normistral.export.checkpoint.tokenizer_check import surround
from normistral.progress import NoProgress

CHATML = ("<|im_start|>", "<|im_end|>")
OF_5 = json.loads((Path(__file__).parents[2] / "data" / "transformers5.json").read_text(encoding="utf-8"))
REFUSED_OF_5 = {
    "special map, twice": "describe '<|im_end|>' in two ways",
    "LlamaTokenizer of a Llama, older form": "builds a LlamaTokenizer anew",
    "GPT2Tokenizer over other splits": "builds a GPT2Tokenizer anew",
}


def open_folder(folder: Path) -> Checkpoint:
    workspace = Path(tempfile.mkdtemp(dir=folder.parent))
    return open_checkpoint(Located("folder", folder, folder.name, None, None), workspace, progress=NoProgress())


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


def added(content: str, **flags: bool) -> dict[str, Any]:
    token = {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return token | {"special": True} | flags


def expect_ids_of_transformers(folder: Path, *tokens: str) -> Checkpoint:
    """Open a checkpoint, and compare what it gives with what transformers makes of the same folder, and of the view."""
    opened = open_folder(folder)
    ours = Tokenizer.from_folder(opened.folder)
    for place in (folder, opened.folder):
        theirs = AutoTokenizer.from_pretrained(place, local_files_only=True)
        for text in ("Hei på deg, Ærøy!\n  Ja.", "", *(surround(token) for token in tokens)):
            assert ours.encode(text) == theirs(text)["input_ids"], (place.name, text)
    return opened


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Room for three tokens that its tokenizer.json does not have."""
    folder = make_mistral(tmp_path / "model", layers=1, vocab=VOCABULARY + 3)
    document = read_json(folder / "tokenizer.json")
    vocabulary = {word: i for word, i in document["model"]["vocab"].items() if i < VOCABULARY}
    edit_json(folder / "tokenizer.json", model=document["model"] | {"vocab": vocabulary})
    return folder


@pytest.mark.parametrize("name", OF_5["cases"])
def test_what_transformers_5_saved_gives_the_ids_of_transformers_5(tmp_path: Path, name: str) -> None:
    case = OF_5["cases"][name]
    config = json.loads(case["files"]["config.json"])
    make = make_mistral if config["model_type"] == "mistral" else make_llama
    folder = make(tmp_path / "model", layers=1, vocab=350, chat=False)
    for stale in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / stale).unlink()
    for file, text in case["files"].items():
        if file == "config.json":
            edit_json(folder / file, transformers_version=config["transformers_version"])
        else:
            text = OF_5["tokenizers"][text] if file == "tokenizer.json" else text
            (folder / file).write_text(text, encoding="utf-8")
    if name in REFUSED_OF_5:
        error = refusal(folder)
        assert REFUSED_OF_5[name] in error.message
        assert "TokenizersBackend" in error.hint or "twice" in name
        return
    opened = open_folder(folder)
    tokenizer = Tokenizer.from_folder(opened.folder)
    assert [tokenizer.encode(text) for text in OF_5["texts"]] == case["ids"]
    if "rendered" in case:
        template = ChatTemplate(opened.template, tokenizer)
        assert template.render([{"role": "user", "content": "Hva?"}]) == case["rendered"]
    theirs = AutoTokenizer.from_pretrained(opened.folder, local_files_only=True)  # 4.57, of the files that are shipped
    assert [theirs(text)["input_ids"] for text in OF_5["texts"]] == case["ids"]


def test_a_byte_order_mark_is_no_part_of_a_json_file(model: Path) -> None:
    expected = {file.name: file.read_bytes() for file in open_folder(model).tokenizer_files}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).write_bytes(codecs.BOM_UTF8 + (model / name).read_bytes())
    opened = open_folder(model)
    for file in opened.tokenizer_files:
        assert file.read_bytes() == expected[file.name]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 17209920\n", "is a pointer of Git LFS"),
        ('{"a": "å"}'.encode("utf-16"), "is a text in UTF-16"),
        (b'{"a": "\xe5"}', "UTF-8"),
        (b'{"version": "1.0", "truncation": nul', "is not valid JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_called_what_it_is(model: Path, name: str, content: bytes, what: str) -> None:
    (model / name).write_bytes(content)
    message = refusal(model).message
    assert name in message
    assert what in message


def test_tokenizer_json_ships_byte_for_byte(model: Path) -> None:
    raw = (model / "tokenizer.json").read_bytes() + b"\n\n"
    (model / "tokenizer.json").write_bytes(raw)
    opened = expect_ids_of_transformers(model, *CHATML)
    assert (opened.folder / "tokenizer.json").read_bytes() == raw
    assert opened.added_tokens == ()


def test_truncation_and_padding_that_training_left_change_nothing(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", layers=1, chat=False, adds_bos=True)
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0}
    edit_json(folder / "tokenizer.json", truncation=cut, padding=pad | {"pad_token": "</s>"})
    opened = expect_ids_of_transformers(folder)
    assert opened.adds_bos
    assert opened.notes == ()
    assert (opened.folder / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_cuts_at_random_is_refused(model: Path) -> None:
    """transformers would do so too, and a comparison may find both alike by chance."""
    document = read_json(model / "tokenizer.json")
    edit_json(model / "tokenizer.json", model=document["model"] | {"dropout": 0.01})
    assert "dropout is 0.01" in refusal(model).message


# Tokens that stand only beside tokenizer.json, and the files that name them.
BESIDE: dict[str, dict[str, dict[str, Any]]] = {
    "additional_special_tokens": {"tokenizer_config": {"additional_special_tokens": ["<|tool|>", "<|/tool|>"]}},
    "added_tokens_decoder": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                str(VOCABULARY): added("<|tool|>"),
                str(VOCABULARY + 1): added("<|/tool|>", special=False, lstrip=True, rstrip=True),
            }
        }
    },
    "added_tokens.json": {
        "tokenizer_config": {"added_tokens_decoder": ...},
        "added_tokens": {"<|tool|>": VOCABULARY, "<|/tool|>": VOCABULARY + 1},
    },
    "special_tokens_map.json": {
        "tokenizer_config": {"added_tokens_decoder": ...},
        "special_tokens_map": {"additional_special_tokens": ["<|tool|>", added("<|/tool|>", rstrip=True)]},
    },
    "extra_special_tokens": {
        "tokenizer_config": {"extra_special_tokens": {"tool_token": "<|tool|>", "no_tool_token": "<|/tool|>"}}
    },
    "sep and cls": {
        "tokenizer_config": {"sep_token": "<|tool|>", "cls_token": added("<|/tool|>") | {"__type": "AddedToken"}}
    },
}


@pytest.mark.parametrize("place", BESIDE)
def test_tokens_that_stand_only_beside_tokenizer_json_are_added_to_it(model: Path, place: str) -> None:
    for stem, changes in BESIDE[place].items():
        if not (model / f"{stem}.json").exists():
            write_json(model / f"{stem}.json", {})
        edit_json(model / f"{stem}.json", **changes)
    opened = expect_ids_of_transformers(model, "<|tool|>", "<|/tool|>")
    assert sorted(opened.added_tokens) == ["<|/tool|>", "<|tool|>"]
    assert any("<|tool|>" in note for note in opened.notes)
    before, after = read_json(model / "tokenizer.json"), read_json(opened.folder / "tokenizer.json")
    assert {key for key in after if after[key] != before[key]} == {"added_tokens"}


def test_a_token_that_the_model_has_no_room_for_is_named_with_its_file(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", additional_special_tokens=[f"<|{i}|>" for i in range(4)])
    message = refusal(model).message
    assert f"its ids run to {VOCABULARY + 3}" in message
    assert "the last token is '<|3|>'" in message
    edit_json(model / "tokenizer_config.json", additional_special_tokens=["<|0|>", "<|1|>"])
    edit_json(model / "tokenizer_config.json", pad_token="[PAD]", sep_token="[SEP]")
    edit_json(model / "config.json", vocab_size=VOCABULARY + 1)
    message = refusal(model).message
    assert "tokenizer_config.json names '[PAD]' as pad_token" in message
    assert f"the model's ids run to {VOCABULARY}" in message


@pytest.mark.parametrize("adds", [True, False])
def test_bos_and_eos_of_a_class_that_rebuilds_what_it_puts_around_a_text(tmp_path: Path, adds: bool) -> None:
    folder = make_mistral(tmp_path / "model", layers=1, adds_bos=not adds)
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizer",
        add_bos_token=adds,
        add_eos_token=adds,
        legacy=False,
    )
    opened = expect_ids_of_transformers(folder, *CHATML)
    assert opened.adds_bos is adds
    before, after = read_json(folder / "tokenizer.json"), read_json(opened.folder / "tokenizer.json")
    assert {key for key in after if after[key] != before[key]} == {"post_processor"}
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")  # leaves the file's
    opened = expect_ids_of_transformers(folder)
    assert opened.adds_bos is not adds
    assert (opened.folder / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_the_blank_before_a_text_follows_the_settings_as_in_transformers(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", add_prefix_space=True)
    opened = expect_ids_of_transformers(model, *CHATML)
    assert Tokenizer.from_folder(opened.folder).encode("a") != Tokenizer.from_folder(model).encode("a")


def test_special_tokens_that_transformers_splits_are_refused_by_the_right_name(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", split_special_tokens=True)
    error = refusal(model)
    assert "tokenizer_config.json has split_special_tokens" in error.message
    assert "remove split_special_tokens" in error.hint


def test_a_class_without_a_tokenizer_json_is_named(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", tokenizer_class="CTRLTokenizer")
    assert "tokenizer_config.json" in refusal(model).message
    edit_json(model / "tokenizer_config.json", tokenizer_class="NoSuchTokenizer")
    error = refusal(model)
    assert "NoSuchTokenizer" in error.message
    assert "tokenizer.json itself can be read" in error.hint


def test_a_token_of_any_length_is_not_looked_for(model: Path) -> None:
    for file, changes in (
        ("tokenizer_config.json", {"bos_token": "x" * 100_000}),
        ("special_tokens_map.json", {"additional_special_tokens": [added("y" * 100_000)]}),
    ):
        raw = (model / file).read_bytes()
        edit_json(model / file, **changes)
        assert f"{file} has a token of 100000 characters" in refusal(model).message
        (model / file).write_bytes(raw)


def test_paths_in_the_settings_are_not_followed(model: Path, tmp_path: Path) -> None:
    other = make_mistral(tmp_path / "other", layers=1, thinking=True)
    edit_json(model / "tokenizer_config.json", tokenizer_file=str(other / "tokenizer.json"), name_or_path=str(other))
    opened = open_folder(model)
    assert (opened.folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert str(other) not in (opened.folder / "tokenizer_config.json").read_text(encoding="utf-8")


def test_a_template_sees_all_special_tokens_of_transformers(model: Path) -> None:
    text = (
        "{{ sep_token }}{{ image_token }}{% for t in additional_special_tokens %}[{{ t }}]{% endfor %}"
        "{% if tools is none and documents is none %}{{ strftime_now('%Y')[:2] }}{% endif %}" + TEMPLATE
    )
    names = {"sep_token": "</s>", "extra_special_tokens": {"image_token": "<image>"}}
    edit_json(model / "tokenizer_config.json", chat_template=text, additional_special_tokens=["<|tool|>"], **names)
    opened = expect_ids_of_transformers(model, "<|tool|>", "<image>")
    assert opened.template is not None
    ours = ChatTemplate(opened.template, Tokenizer.from_folder(opened.folder))
    theirs = AutoTokenizer.from_pretrained(model, local_files_only=True)
    messages = [{"role": "user", "content": "Hva?"}]
    assert ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render(messages).startswith("</s><image>[<|tool|>]")


BROKEN = {
    "tokenizer": ("tokenizer_config.json", {"split_special_tokens": True}),
    "template": ("tokenizer_config.json", {"chat_template": "{{ raise_exception('nei') }}"}),
    "stop token": ("special_tokens_map.json", {"eos_token": "<|slutt|>"}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_needs_no_weights_is_refused_before_they_are_looked_at(model: Path, monkeypatch, what: str) -> None:
    monkeypatch.setattr(checkpoints, "read_tensors", None)
    file, changes = BROKEN[what]
    edit_json(model / file, **changes)
    refusal(model)


def test_a_gguf_files_template_is_refused_before_its_weights_are_unpacked(tmp_path: Path, monkeypatch) -> None:
    from tiny_gguf import byte_level_vocabulary, write_gguf

    from normistral.export.checkpoint import gguf

    monkeypatch.setattr(gguf, "_write_weights", None)
    folder = make_llama(tmp_path / "model", vocab=VOCABULARY + 1)
    vocabulary = byte_level_vocabulary(folder)
    vocabulary |= {"tokens": [*vocabulary["tokens"][:-1], "en"], "merges": ["e n"]}
    vocabulary |= {"template": "{{ raise_exception('nei') }}"}
    path = write_gguf(tmp_path / "model.gguf", folder, vocabulary)
    (tmp_path / "workspace").mkdir()
    with pytest.raises(CheckpointError, match="nei"):
        open_checkpoint(Located("gguf", path, path.name, None, None), tmp_path / "workspace", progress=NoProgress())


def test_these_are_the_versions_that_the_rules_were_read_from() -> None:
    assert transformers.__version__.startswith("4.57.")
    assert OF_5["transformers"].startswith("5.")


def test_random_changes_of_the_files_give_transformers_ids_or_a_refusal() -> None:
    """A few of `python tests/scripts/mutate_tokenizers.py`, which makes 80 and more."""
    lines: list[str] = []
    outcome = mutate_tokenizers.run(count=15, seed=5, report=lines.append)
    assert outcome["DIFFERENT"] == 0, "\n".join(lines)
    assert outcome["equal"] >= 8
