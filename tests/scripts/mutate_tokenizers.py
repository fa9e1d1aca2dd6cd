"""Random changes of one thing in a tokenizer's files: what is exported gives transformers' ids, or it is refused.

    python tests/scripts/mutate_tokenizers.py [--count 80] [--seed 15]

The truth is transformers 4.57 on the changed folder itself. What it cannot open has no ids; there the export may
refuse, or read the files as transformers 5 does (test_tokenizer_files.py has stored ids of that).
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from text_models import byte_level, sentencepiece
from tiny_models import TEMPLATE, make_mistral, write_json

from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import NormistralError
from normistral.export.checkpoint.locate import Located
from normistral.export.checkpoint.open import open_checkpoint
from normistral.export.checkpoint.tokenizer_check import surround
from normistral.progress import NoProgress

TOKENS = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|ny|>", "<|to|>", "Oslo")
MESSAGES = [{"role": "user", "content": "Hva heter  hovedstaden?"}]
Document = dict[str, Any]
Change = Callable[[random.Random, dict[str, Document]], None]


def changes() -> dict[str, list[Change]]:
    """What can happen to each file; every change is of one field."""
    return {
        "tokenizer.json": [
            _swap_ids,
            _drop_merge,
            _swap_merges,
            _set(
                "tokenizer",
                ("normalizer",),
                [None, {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "▁"}],
            ),
            _set(
                "tokenizer",
                ("post_processor",),
                [None, _around("<s>", ""), _around("", "</s>"), _around("<s>", "</s>")],
            ),
            _set(
                "tokenizer",
                ("pre_tokenizer",),
                [None, {"type": "Digits", "individual_digits": True}, _bytes(True), _bytes(False)],
            ),
            _set("tokenizer", ("model", "ignore_merges"), [True]),
            _set("tokenizer", ("model", "unk_token"), ["<pad>", None]),
            _set("tokenizer", ("model", "dropout"), [0.5]),
            _set(
                "tokenizer",
                ("truncation",),
                [{"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}],
            ),
            _set("tokenizer", ("decoder",), [None, {"type": "Fuse"}, {"type": "ByteLevel"}]),
            _flip_flag,
            _drop_added,
            _rename_added,
        ],
        "tokenizer_config.json": [
            _set(
                "settings",
                ("tokenizer_class",),
                [
                    "LlamaTokenizer",
                    "LlamaTokenizerFast",
                    "GPT2Tokenizer",
                    "BloomTokenizerFast",
                    "TokenizersBackend",
                    "X",
                    ...,
                ],
            ),
            _set("settings", ("add_bos_token",), [True, False]),
            _set("settings", ("add_eos_token",), [True, False]),
            _set("settings", ("add_prefix_space",), [True, False, None]),
            _set("settings", ("split_special_tokens",), [True]),
            _set("settings", ("legacy",), [True, False]),
            _set(
                "settings",
                ("bos_token",),
                ["</s>", "<|ny|>", None, ..., {"content": "<s>", "lstrip": True, "__type": "AddedToken"}],
            ),
            _set("settings", ("eos_token",), ["<|ny|>", "Oslo", None, "</s>"]),
            _set("settings", ("unk_token",), ["<pad>", "<|ny|>", None]),
            _set("settings", ("pad_token",), ["[PAD]", "<unk>", None]),
            _set("settings", ("additional_special_tokens",), [["<|ny|>"], ["<|ny|>", "<|to|>"], ["Oslo"], []]),
            _set("settings", ("extra_special_tokens",), [["<|ny|>"], {"image_token": "<|ny|>"}, {}, []]),
            _set(
                "settings",
                ("added_tokens_decoder",),
                [
                    {"4": _flags("<|im_start|>", lstrip=True)},
                    {"400": _flags("<|ny|>", special=False)},
                    {"9": _flags("<|to|>")},
                    {},
                ],
            ),
            _set(
                "settings",
                ("chat_template",),
                [
                    "{{ bos_token }}" + TEMPLATE,
                    "{{ eos_token }}{{ pad_token }}{{ unk_token }}",
                    "{{ additional_special_tokens }}",
                    "{% if x %}",
                    None,
                ],
            ),
            _set("settings", ("clean_up_tokenization_spaces",), [True]),
            _set("settings", ("model_max_length",), [4]),
        ],
        "special_tokens_map.json": [
            _set("map", ("eos_token",), ["<|ny|>", "<|im_end|>", _flags("</s>", rstrip=True)]),
            _set("map", ("bos_token",), ["</s>", _flags("<s>", lstrip=True)]),
            _set(
                "map",
                ("additional_special_tokens",),
                [["<|ny|>"], [_flags("<|ny|>", lstrip=True)], ["<|im_start|>", "<|to|>"]],
            ),
            _set("map", ("sep_token",), ["<|ny|>", "Oslo"]),
        ],
        "added_tokens.json": [
            _set("added", ("<|ny|>",), [400, 401, 3, 9]),
            _set("added", ("Oslo",), [400, 7]),
            _set("added", ("<|im_start|>",), [4, 400]),
        ],
    }


def run(count: int, seed: int, report: Callable[[str], None] = print) -> collections.Counter[str]:
    """How many changes ended how: "refused", "equal", "unread by transformers"; "DIFFERENT" should be none."""
    rng, outcome = random.Random(seed), collections.Counter[str]()
    every = [(file, change) for file, several in changes().items() for change in several]
    with tempfile.TemporaryDirectory() as scratch:
        base = make_mistral(Path(scratch) / "base", layers=1, hidden=16, heads=2, kv_heads=1, head_dim=8, vocab=700)
        for number in range(count):
            folder = Path(scratch) / f"{number}"
            shutil.copytree(base, folder)
            file, change = every[number % len(every)] if count >= len(every) else rng.choice(every)
            what = _write(rng, folder, file, change)
            result, why = _compare(folder, Path(scratch) / f"workspace{number}")
            outcome[result] += 1
            report(f"{result:22} {what[:90]:90} {why}")
            shutil.rmtree(folder)
    return outcome


def _write(rng: random.Random, folder: Path, file: str, change: Change) -> str:
    """A checkpoint's tokenizer files with one change, in a random one of the usual forms. Returns what it is."""
    backend = rng.choice((byte_level, sentencepiece, lambda: sentencepiece("legacy")))()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    documents: dict[str, Document] = {
        "tokenizer": json.loads(backend.to_str()),
        "settings": {"tokenizer_class": rng.choice(("PreTrainedTokenizerFast", "LlamaTokenizer")), **names},
        "map": dict(names),
        "added": {},
    }
    if rng.random() < 0.5:
        flags = {str(t.pop("id")): t for t in copy.deepcopy(documents["tokenizer"]["added_tokens"])}
        documents["settings"]["added_tokens_decoder"] = flags
    documents["settings"]["chat_template"] = TEMPLATE
    before = copy.deepcopy(documents)
    change(rng, documents)
    stems = {
        "tokenizer": "tokenizer",
        "settings": "tokenizer_config",
        "map": "special_tokens_map",
        "added": "added_tokens",
    }
    for name, document in documents.items():
        if name != "added" or document:
            write_json(folder / f"{stems.get(name, name)}.json", document)
    decoder = "with" if "added_tokens_decoder" in before["settings"] else "no"
    kind = f"{documents['settings'].get('tokenizer_class')}, {decoder} decoder"
    return f"{file}: {_difference(before, documents)} ({kind})"


def _compare(folder: Path, workspace: Path) -> tuple[str, str]:
    from transformers import AutoTokenizer

    texts = ["Hovedstaden i Norge er Oslo.\n  Blåbær 123 😀", "", " ", *(surround(token) for token in TOKENS)]
    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        expected = [list(theirs(text)["input_ids"]) for text in texts]
    except BaseException as exc:
        theirs, expected = None, [[type(exc).__name__]]
    workspace.mkdir()
    try:
        opened = open_checkpoint(Located("folder", folder, "m", None, None), workspace, progress=NoProgress())
    except NormistralError as error:
        return "refused", error.message[:140]
    if theirs is None:
        return "unread by transformers", str(expected[0][0])
    ours = Tokenizer.from_folder(opened.folder)
    for text, ids in zip(texts, expected, strict=True):
        if ours.encode(text) != ids:
            return "DIFFERENT", f"{text!r}: {ours.encode(text)} instead of {ids}"
        if ours.decode(ids) != theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
            return "DIFFERENT", f"text of {ids}"
    if opened.template is not None:
        rendered = ChatTemplate(opened.template, ours).render(MESSAGES)
        wanted = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        if rendered != wanted:
            return "DIFFERENT", f"template: {rendered!r} instead of {wanted!r}"
    return "equal", ""


def _set(document: str, path: tuple[str, ...], values: list[Any]) -> Change:
    def change(rng: random.Random, documents: dict[str, Document]) -> None:
        target = documents[document]
        for key in path[:-1]:
            target = target[key]
        value = rng.choice(values)
        if value is ...:
            target.pop(path[-1], None)
        else:
            target[path[-1]] = value

    return change


def _flags(content: str, **flags: bool) -> Document:
    token = {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return token | {"special": True} | flags


def _around(before: str, after: str) -> Document:
    ids = {"<s>": 1, "</s>": 2}
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} if token else None for token in (before, after)]
    single = [piece for piece in (pieces[0], {"Sequence": {"id": "A", "type_id": 0}}, pieces[1]) if piece]
    tokens = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (before, after) if token}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}


def _bytes(prefix: bool) -> Document:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}


def _swap_ids(rng: random.Random, documents: dict[str, Document]) -> None:
    vocabulary = documents["tokenizer"]["model"]["vocab"]
    one, other = rng.sample([word for word in vocabulary if vocabulary[word] > 6], 2)
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def _drop_merge(rng: random.Random, documents: dict[str, Document]) -> None:
    merges = documents["tokenizer"]["model"]["merges"]
    merges.pop(rng.randrange(len(merges)))


def _swap_merges(rng: random.Random, documents: dict[str, Document]) -> None:
    merges = documents["tokenizer"]["model"]["merges"]
    at = rng.randrange(len(merges) - 1)
    merges[at : at + 2] = merges[at + 1], merges[at]


def _flip_flag(rng: random.Random, documents: dict[str, Document]) -> None:
    token = rng.choice(documents["tokenizer"]["added_tokens"])
    flag = rng.choice(("lstrip", "rstrip", "single_word", "normalized", "special"))
    token[flag] = not token[flag]


def _drop_added(rng: random.Random, documents: dict[str, Document]) -> None:
    added = documents["tokenizer"]["added_tokens"]
    added.pop(rng.randrange(len(added)))


def _rename_added(rng: random.Random, documents: dict[str, Document]) -> None:
    rng.choice(documents["tokenizer"]["added_tokens"])["content"] = rng.choice(("<|ny|>", "Oslo"))


def _difference(before: Any, after: Any, where: str = "") -> str:
    """The first place where two documents differ, and what is there now."""
    for path, old, new in _differences(before, after, where):
        shown = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
        return f"{path.strip('.')} {shown[0][:30]} -> {shown[1][:60]}"
    return "nothing"


def _differences(before: Any, after: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            yield from _differences(before.get(key), after.get(key), f"{where}.{key}")
    elif before != after:
        yield where, before, after


def main() -> int:
    """Print each, and a summary; 1 if one was different."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--seed", type=int, default=15)
    arguments = parser.parse_args()
    outcome = run(arguments.count, arguments.seed)
    print(dict(outcome))
    return 1 if outcome["DIFFERENT"] else 0


if __name__ == "__main__":
    sys.exit(main())
