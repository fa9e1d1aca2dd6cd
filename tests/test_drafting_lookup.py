"""Prompt lookup against a search that scans everything; the table of n-grams, its file and its command."""

import json
import os
import random
import subprocess

import numpy as np
import pytest
from drafting_models import draft_always
from hypothesis import given
from hypothesis import strategies as st
from scripted_cli import TESTS, command, make_artifact
from scripted_models import make_model, make_tokenizer
from tiny_models import VOCABULARY

from normistral.artifact.manifest import hash_files, read_manifest, write_manifest
from normistral.cli import main
from normistral.errors import ArtifactError, UsageError
from normistral.runtime.drafting.lookup import PromptLookup
from normistral.runtime.drafting.options import TableOptions
from normistral.runtime.drafting.table import NgramTable, TableDrafter, build_table

SHA = "a" * 64


def scan(token_ids, most):
    """The same by looking everywhere: (token ids, matched)."""
    for length in (5, 4, 3, 2):
        for start in range(len(token_ids) - length - 1, -1, -1):
            if len(token_ids) > length and token_ids[start : start + length] == token_ids[-length:]:
                draft = list(token_ids)
                for place in range(start + length, start + length + most):
                    draft.append(draft[place])
                return draft[len(token_ids) :], length
    return None


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 12), st.integers(0, 40))
def test_lookup_finds_the_longest_and_latest_match(token_ids, most, in_prompt):
    lookup = PromptLookup(token_ids[:in_prompt])
    for token_id in token_ids[in_prompt:]:
        lookup.observe(token_id)
    draft = lookup.propose(most)
    found = None if draft is None else (draft.token_ids, int(draft.source.removeprefix("lookup ")))
    assert found == scan(token_ids, most)


def test_a_repetition_is_taken_to_go_on():
    assert PromptLookup([1, 2, 3, 1, 2, 3, 1, 2]).propose(7).token_ids == [3, 1, 2, 3, 1, 2, 3]


def count_slowly(texts, options):
    """context -> the token that follows it most often (of equals the smallest), from the definition."""
    followers = {}
    for text in texts:
        for length in (2, 3, 4):
            for place in range(length, len(text)):
                followers.setdefault(tuple(text[place - length : place]), []).append(text[place])
    table = {}
    for context, after in followers.items():
        best = max(sorted(set(after)), key=after.count)
        if after.count(best) >= max(options.min_count, options.min_share * len(after)):
            table[context] = best
    return table


@pytest.mark.parametrize("options", [TableOptions(), TableOptions(1, 1.0), TableOptions(2, 0.5)])
def test_the_table_holds_what_follows_most_often(options):
    luck = random.Random(0)
    texts = [[luck.choice((5, 6, 7, 8)) for _ in range(length)] for length in (300, 90, 4, 2, 0)]
    expected = count_slowly(texts, options)
    table = build_table(texts, SHA, options)
    assert len(table) == len(expected) > 10
    for context, token_id in expected.items():
        found = table.next_token([9, *context])
        assert found is not None
        if found[1] == len(context):
            assert found[0] == token_id
    assert table.next_token([100, 101, 102, 103]) is None
    assert table.next_token([5]) is None


def test_the_longest_context_counts():
    texts = [[1, 2, 3, 4, 50]] * 3 + [[9, 2, 3, 4, 60]] * 9
    table = build_table(texts, SHA)
    assert table.next_token([1, 2, 3, 4]) == (50, 4)
    assert table.next_token([7, 2, 3, 4]) == (60, 3)


def test_a_table_drafter_goes_on_as_long_as_the_table_does():
    drafter = TableDrafter(build_table([[1, 2, 3, 4, 5, 6]] * 3, SHA), [9, 9, 1])
    assert drafter.propose(4) is None
    drafter.observe(2)
    draft = drafter.propose(10)
    assert (draft.token_ids, draft.source) == ([3, 4, 5, 6], "table 2")
    assert drafter.propose(2).token_ids == [3, 4]


@pytest.fixture
def table_file(tmp_path):
    path = tmp_path / "ord.table"
    build_table([[1, 2, 3, 4, 5, 6]] * 3, SHA).write(path)
    return path


def test_a_table_is_the_same_after_writing_and_reading(table_file):
    table = NgramTable.read(table_file, SHA, VOCABULARY)
    assert isinstance(table._contexts, np.memmap)
    assert TableDrafter(table, [1, 2]).propose(9).token_ids == [3, 4, 5, 6]
    assert [path.name for path in table_file.parent.iterdir()] == [table_file.name]
    assert table_file.stat().st_mode & 0o777 == 0o600


def test_another_tokenizer_s_table_is_refused(table_file):
    with pytest.raises(UsageError, match="another tokenizer"):
        NgramTable.read(table_file, "b" * 64, VOCABULARY)


def test_a_table_with_tokens_that_the_model_has_not_is_refused(table_file):
    with pytest.raises(ArtifactError, match="tokens that the model has not"):
        NgramTable.read(table_file, SHA, 6)


@pytest.mark.parametrize("cut", [1, 12, 60])
def test_a_cut_table_is_refused(table_file, cut):
    table_file.write_bytes(table_file.read_bytes()[:-cut])
    with pytest.raises(ArtifactError, match="damaged"):
        NgramTable.read(table_file, SHA, VOCABULARY)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}\n", b"hei\n", b"\xff\xfe\n", b"[" * 5000, b'{"format": "normistral draft table 1"}\n', b"x" * 10_000]
    + [
        json.dumps({"format": "normistral draft table 1", "entries": entries, "tokenizer_sha256": SHA}).encode() + b"\n"
        for entries in (-1, True, 1.5, None)
    ],
)
def test_what_is_no_table_is_refused(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is no draft table"):
        NgramTable.read(path, SHA, VOCABULARY)


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the draft table .*: No such file"):
        NgramTable.read(tmp_path / "x", SHA, VOCABULARY)


def test_the_table_is_asked_where_the_text_so_far_gives_nothing(tmp_path):
    said = "Det er blåbær i skogen."
    model = draft_always(make_model(tmp_path, [said]))
    assert model.chat().send("hei").timings.accepted_tokens == 0
    ids = model.tokenizer.encode(said, add_special_tokens=False)
    model._drafting.table = build_table([ids] * 3, SHA)
    answer = model.chat().send("hei")
    assert answer.text == said
    assert answer.timings.accepted_tokens > 12


# The command


@pytest.fixture
def artifact(tmp_path):
    """An artifact as far as a tokenizer goes."""
    folder = make_artifact(tmp_path / "artifact")
    make_tokenizer(folder)
    write_manifest(folder, _with_files(folder))
    return folder


def _with_files(folder):
    import dataclasses

    return dataclasses.replace(read_manifest(folder), files=hash_files(folder))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "tekst.txt"
    path.write_text("Blåbær og tyttebær, blåbær og bringebær, blåbær og is.\n" * 3, encoding="utf-8")
    return path


def test_the_command_makes_a_table_of_this_tokenizer(tmp_path, artifact, text, capsys):
    assert main(["draft-table", str(artifact), str(tmp_path / "bær.table"), "--text", str(text)]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "entries from 189 tokens" in printed.err
    manifest = read_manifest(artifact)
    table = NgramTable.read(tmp_path / "bær.table", manifest.files["tokenizer.json"].sha256, VOCABULARY)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    draft = TableDrafter(table, tokenizer.encode("blåb", add_special_tokens=False)).propose(9)
    assert tokenizer.decode(draft.token_ids).startswith("ær og ")


def test_the_command_does_not_replace_a_file_unless_told_to(tmp_path, artifact, text, capsys):
    output = tmp_path / "x"
    output.write_text("mine")
    arguments = ["draft-table", str(artifact), str(output), "--text", str(text)]
    assert main(arguments) == 2
    assert output.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert output.stat().st_size > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OUT", "--text", "missing.txt"], "cannot read"),
        (["OUT", "--text", "TEXT", "--min-count", "0"], "least count"),
        (["OUT", "--text", "TEXT", "--min-count", "999"], "follows the same tokens 999 times"),
        (["no/such/folder", "--text", "TEXT"], "there is no folder"),
        (["FOLDER", "--text", "TEXT"], "is a folder"),
        (["OUT"], "missing option"),
    ],
)
def test_wrong_usage_of_the_command_leaves_nothing(tmp_path, artifact, text, capsys, arguments, message):
    names = {"OUT": tmp_path / "out", "TEXT": text, "FOLDER": tmp_path, "no/such/folder": tmp_path / "no" / "file"}
    before = sorted(tmp_path.iterdir())
    assert main(["draft-table", str(artifact), *(str(names.get(a, a)) for a in arguments)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert sorted(tmp_path.iterdir()) == before


def run(tmp_path, *arguments):
    return subprocess.run(
        command(tmp_path, *map(str, arguments), answers=["en to tre, en to tre, en to tre, en to tre"]),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        cwd=TESTS,
        env=os.environ | {"NORMISTRAL_HOME": str(tmp_path / "home")},
    )


def test_json_tells_what_was_drafted_and_off_is_off(tmp_path, artifact):
    done = run(tmp_path, "chat", artifact, "--prompt", "hei", "--draft", "off", "--json")
    timings = json.loads(done.stdout)["timings"]
    assert (timings["drafted_tokens"], timings["accepted_tokens"]) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft", "on"], "'on'"),
        (["--draft", "off", "--draft-table", "x"], "--draft off leaves --draft-table nothing to do"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path, artifact, options, message):
    done = run(tmp_path, "generate", artifact, "--prompt", "hei", *options)
    assert done.returncode == 2
    assert message in done.stderr.decode()
