"""Prompt lookup against a search that scans everything; the options of drafting."""

import json
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_cli import HELPERS, command, make_artifact
from scripted_models import make_tokenizer

from normistral.artifact.manifest import hash_files, read_manifest, write_manifest
from normistral.cli import main
from normistral.errors import UsageError
from normistral.runtime.loading import load
from normistral.runtime.speculative.decoder import PromptLookup


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


def run(tmp_path, *arguments):
    return subprocess.run(
        command(tmp_path, *map(str, arguments), answers=["en to tre, en to tre, en to tre, en to tre"]),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        cwd=HELPERS,
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
        (["--draft-table", "x"], "--draft-table was removed"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path, artifact, options, message):
    done = run(tmp_path, "generate", artifact, "--prompt", "hei", *options)
    assert done.returncode == 2
    assert message in done.stderr.decode()


@pytest.mark.parametrize("arguments", [[], ["ARTIFACT", "OUT", "--text", "x.txt", "--min-count", "3"]])
def test_the_command_that_was_removed_says_so(arguments, capsys):
    assert main(["draft-table", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: draft-table was removed")


def test_load_refuses_a_draft_table(artifact):
    with pytest.raises(UsageError, match="draft_table was removed"):
        load(artifact, draft_table="x")
