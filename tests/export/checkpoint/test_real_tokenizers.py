"""The tokenizers of the family's parents, and one of 11B's kind: ids, text and streamed text are transformers'."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_tokenizers import (
    CHATML,
    make_by_the_recipe_of_11b,
    make_with_sentencepiece,
    make_with_tekken,
)
from tiny_models import edit_json
from transformers import AutoTokenizer

from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import CheckpointError
from normistral.export.checkpoint.files import read_json
from normistral.export.checkpoint.locate import Located
from normistral.export.checkpoint.open import Checkpoint, open_checkpoint
from normistral.export.texts import load_texts
from normistral.progress import NoProgress
from normistral.runtime.detokenizer import StreamDetokenizer

CODE = "def f(x: int) -> str:\n\treturn f'{x:>8}'  # æøå\n\n\nif __name__ == '__main__':\n    print(f(1_000))\n"
TEXTS = [
    *(line for text in load_texts().values() for line in text.splitlines(keepends=True)[::4]),
    *(
        "Sámegiella: čáŋgu, ŧiedju, đ, ž, š; åarjelsaemien gïele",
        "😀👩\u200d👩\u200d👧 🇳🇴 ☕\ufe0f",
        CODE,
        "",
        " ",
        "  x  \n\n  y",
    ),
    *(
        "\x00\x01\x7f\x80\ufffd",
        "ﬁ ½ ㎏ ｆｕｌｌ e\u0301",
        "日本語 العربية",
        "a" * 200,
        "1234567890",
        "<s>Hei</s> <unk>",
    ),
    *("".join(chr(code) for code in range(start, start + 128)) for start in range(0, 1024, 128)),
]
# Where a test is about the files around tokenizer.model; test_tokenizer_model_alone has all 28,000.
MERGES = 4_000
CHATS = [
    *(
        "<|im_start|>user\nHei!<|im_end|>\n<|im_start|>assistant\n",
        "x<|im_end|>",
        " <|im_end|> ",
        "<|im_end|><|im_end|>a",
    ),
    *("a <|im_start|> b", "<|im_start|>"),
]


@pytest.fixture(scope="module", autouse=True)
def merges_found_once() -> Iterator[None]:
    """transformers looks for the merges of a sentencepiece vocabulary once; each search takes a second."""
    # transformers has a function of the same name, which may take its place as an attribute of the package.
    convert_slow_tokenizer = importlib.import_module("transformers.convert_slow_tokenizer")
    find, found = convert_slow_tokenizer.generate_merges, {}

    def find_once(vocabulary: Any, scores: Any) -> Any:
        key = (tuple(vocabulary.items()), None if scores is None else tuple(dict(scores).items()))
        if key not in found:
            found[key] = find(vocabulary, scores)
        return list(found[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_slow_tokenizer, "generate_merges", find_once)
        yield


def open_folder(folder: Path) -> Checkpoint:
    workspace = Path(tempfile.mkdtemp(dir=folder.parent))
    return open_checkpoint(Located("folder", folder, folder.name, None, None), workspace, progress=NoProgress())


def expect_parity(folder: Path, texts: list[str], *, from_view: bool = False) -> Checkpoint:
    """Ids, decoded and streamed text of the opened checkpoint are those of transformers on the folder as it was."""
    opened = open_folder(folder)
    ours = Tokenizer.from_folder(opened.folder)
    theirs = AutoTokenizer.from_pretrained(opened.folder if from_view else folder, local_files_only=True)
    expected = theirs(texts)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text) == ids, text
        whole = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == whole
        assert stream(ours, ids) == whole
    return opened


def stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids that come one at a time."""
    detokenizer = StreamDetokenizer(tokenizer)
    return "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()


@pytest.mark.parametrize(("version", "legacy"), [("v1", None), ("v3", False)])
def test_tokenizer_model_alone(tmp_path: Path, version: str, legacy: bool | None) -> None:
    opened = expect_parity(make_with_sentencepiece(tmp_path / "model", version, legacy=legacy), TEXTS)
    assert opened.adds_bos
    assert "tokenizer.json was made from tokenizer.model" in opened.notes


@pytest.mark.parametrize(
    ("chatml", "legacy"),
    [
        ("added_tokens.json", None),
        ("added_tokens_decoder", False),
        ("additional_special_tokens", None),
        ("special_tokens_map.json", False),
    ],
)
def test_chatml_beside_tokenizer_model(tmp_path: Path, chatml: str, legacy: bool | None) -> None:
    """All four ways in which fine-tunes are published, which the exporter refused."""
    folder = make_with_sentencepiece(tmp_path / "model", "v1", chatml=chatml, legacy=legacy, merges=MERGES)
    opened = expect_parity(folder, [*TEXTS[::8], *CHATS])
    assert {token.text for token in Tokenizer.from_folder(opened.folder).added_tokens} >= set(CHATML)
    if chatml == "special_tokens_map.json":
        assert 3 + 256 + 3295 + MERGES + 1 in opened.stop_token_ids  # behind control tokens, bytes, letters, merges


def test_converted_tokenizer_json_with_and_without_chatml(tmp_path: Path) -> None:
    source = make_with_sentencepiece(tmp_path / "source", "v3", legacy=False, merges=MERGES)
    folder = make_with_sentencepiece(tmp_path / "model", "v3", merges=MERGES)
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    opened = expect_parity(folder, TEXTS)
    assert (opened.folder / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    edit_json(folder / "tokenizer_config.json", additional_special_tokens=list(CHATML))
    opened = expect_parity(folder, [*TEXTS[::8], *CHATS])
    assert opened.added_tokens == CHATML


def test_prefix_space_makes_transformers_read_tokenizer_model(tmp_path: Path) -> None:
    """With both files, tokenizer.json ships where it says the same; where it does not, the setting is named."""
    folder = make_with_sentencepiece(tmp_path / "model", "v1", legacy=False, merges=MERGES)
    AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", add_prefix_space=True)
    opened = expect_parity(folder, TEXTS[::8])
    assert (opened.folder / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    document = read_json(folder / "tokenizer.json")
    document["model"]["merges"] = document["model"]["merges"][:-1000]
    edit_json(folder / "tokenizer.json", model=document["model"])
    with pytest.raises(CheckpointError, match=r"add_prefix_space in tokenizer_config\.json") as caught:
        open_folder(folder)
    assert "remove add_prefix_space" in caught.value.hint
    (folder / "tokenizer.model").unlink()  # transformers 4.57 opens nothing then: tokenizer.json is the truth
    expect_parity(folder, TEXTS[::8], from_view=True)


def test_tekken(tmp_path: Path) -> None:
    expect_parity(make_with_tekken(tmp_path / "model", 8_000), [*TEXTS, *CHATS])


def test_recipe_of_11b(tmp_path: Path) -> None:
    opened = expect_parity(make_by_the_recipe_of_11b(tmp_path / "model"), [*TEXTS, "<special_3> x <special_3>"])
    assert opened.adds_bos
