"""Reasoning at the command line: never on stdout of a single answer, dimmed, hidden when asked for."""

import io
import json
import os
import pty
import sys
from pathlib import Path

import pytest
from fork_server import start_forked
from scripted_cli import HELPERS, command, make_artifact
from scripted_models import TAG_TEXTS, TAG_TOKENS
from test_cli import require_two_lines, run

from normistral.cli import main
from normistral.commands.console import AnswerWriter

WRITTEN = " <think> Blåbær?\nHm.</think> Oslo, på Østlandet 😀."
REASONING, ANSWER = "Blåbær?\nHm.", "Oslo, på Østlandet 😀."
UNFINISHED = {"answers": ["<think> Hm, hm"]}
NO_ANSWER = (
    "warning: there is no answer: the reasoning did not end ({}); --max-reasoning-tokens N ends it after N tokens"
)


@pytest.fixture(params=["tokens", "text"])
def thinker(request, tmp_path):
    return make_artifact(tmp_path / "tenker", reasoning=TAG_TOKENS if request.param == "tokens" else TAG_TEXTS)


@pytest.fixture
def plain(tmp_path):
    return make_artifact(tmp_path / "vanlig")


def ask(tmp_path, artifact, *options, name="chat", prompt="Hva?", written=WRITTEN, **settings):
    settings = {"answers": [written], **settings}
    done = run(tmp_path, name, artifact, "--prompt", prompt, *options, settings=settings)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_answer_is_on_stdout_and_the_reasoning_on_stderr(tmp_path, thinker):
    assert ask(tmp_path, thinker) == (0, ANSWER + "\n", REASONING + "\n")


def test_a_reasoning_that_ends_its_line_itself_gets_no_other_line_end(tmp_path, thinker):
    assert ask(tmp_path, thinker, written="<think>\nHm.\n</think>\n\nOslo\n") == (0, "Oslo\n", "Hm.\n")


def test_hidden_reasoning_leaves_stderr_empty(tmp_path, thinker):
    assert ask(tmp_path, thinker, "--hide-reasoning") == (0, ANSWER + "\n", "")


def test_a_thinking_model_that_does_not_think_is_like_any_other(tmp_path, thinker):
    assert ask(tmp_path, thinker, written=" Oslo") == (0, " Oslo\n", "")


def test_json_has_the_reasoning_in_a_field_of_its_own(tmp_path, thinker, plain):
    code, out, err = ask(tmp_path, thinker, "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert (document["text"], document["reasoning"], document["reasoning_open"]) == (ANSWER, REASONING, False)
    document = json.loads(ask(tmp_path, plain, "--json")[1])
    assert (document["text"], document["reasoning"], document["reasoning_open"]) == (WRITTEN, "", False)


def test_generate_tells_them_apart_too(tmp_path):
    artifact = make_artifact(tmp_path / "tenker", reasoning=TAG_TOKENS)
    found = ask(tmp_path, artifact, name="generate", prompt="<instruction> Hva?</instruction>")
    assert found == (0, ANSWER + "\n", REASONING + "\n")
    document = json.loads(ask(tmp_path, artifact, "--json", name="generate", prompt="</instruction>")[1])
    assert document["reasoning"] == REASONING


def test_a_budget_shortens_the_reasoning(tmp_path):
    artifact = make_artifact(tmp_path / "tenker", reasoning=TAG_TOKENS)
    # The scripted model goes on at the place that the closing tag took: one byte of its reasoning is lost.
    code, out, err = ask(tmp_path, artifact, "--max-reasoning-tokens", "2", written="<think>abcdef")
    assert (code, out, err) == (0, "def\n", "ab\n")
    assert ask(tmp_path, artifact, "--max-reasoning-tokens", "0", written="<think>abcdef")[1:] == ("bcdef\n", "")


@pytest.mark.parametrize(
    ("options", "why"),
    [([], "the model stopped"), (["--max-new-tokens", "11"], "--max-new-tokens was reached")],
)
def test_an_answer_that_is_missing_is_said_to_be(tmp_path, thinker, options, why):
    code, out, err = ask(tmp_path, thinker, *options, written="<think> Hm, hm, hm")
    assert (code, out) == (0, "")
    shown, warning = err.splitlines()
    assert shown
    assert "Hm, hm, hm".startswith(shown)
    assert warning == NO_ANSWER.format(why)
    hidden = ask(tmp_path, thinker, *options, "--hide-reasoning", written="<think> Hm, hm, hm")
    assert hidden == (0, "", NO_ANSWER.format(why) + "\n")


def test_a_context_that_is_full_inside_the_reasoning_is_said_to_be(tmp_path, thinker):
    _, out, err = ask(tmp_path, thinker, written="<think>" + "x" * 300, context_length=100)
    assert out == ""
    assert err.splitlines()[1:] == [NO_ANSWER.format("the context is full")]


def test_an_empty_answer_behind_a_whole_reasoning_is_no_missing_one(tmp_path, thinker):
    assert ask(tmp_path, thinker, written="<think>Hm.</think>") == (0, "", "Hm.\n")


def test_an_answer_that_is_cut_off_behind_its_reasoning(tmp_path):
    artifact = make_artifact(tmp_path / "tenker", reasoning=TAG_TOKENS)
    _, out, err = ask(tmp_path, artifact, "--max-new-tokens", "5", written="<think>a</think>bcdef")
    assert (out, err) == ("bc\n", "a\nwarning: the answer is cut off: --max-new-tokens was reached\n")


@pytest.mark.parametrize("name", ["chat", "generate"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max-reasoning-tokens", "5"], "max_reasoning_tokens means nothing here: vanlig is no model"),
        (["--hide-reasoning"], "--hide-reasoning means nothing here: vanlig is no model"),
        (["--max-reasoning-tokens", "-1"], "max_reasoning_tokens must be a whole number from 0"),
    ],
)
def test_options_for_reasoning_are_refused_before_the_weights_are_loaded(plain, capsys, name, options, expected):
    assert main([name, str(plain), "--prompt", "x", *options]) == 2  # it has no weights: loading would fail
    assert expected in require_two_lines(capsys.readouterr().err)[0]


def test_json_hides_nothing(thinker, capsys):
    assert main(["chat", str(thinker), "--prompt", "x", "--json", "--hide-reasoning"]) == 2
    message, hint = require_two_lines(capsys.readouterr().err)
    assert "--json" in message
    assert "--hide-reasoning" in hint


def test_info_shows_the_markers(tmp_path, plain, capsys):
    for markers, expected in (
        (TAG_TOKENS, f"between <think> and </think>, tokens {TAG_TOKENS.open_id} and {TAG_TOKENS.close_id}"),
        (TAG_TEXTS, "between <think> and </think>, found in the text"),
    ):
        artifact = make_artifact(tmp_path / str(markers.open_id), reasoning=markers)
        assert main(["info", str(artifact)]) == 0
        assert f"reasoning     {expected}\n" in capsys.readouterr().out
    assert main(["info", str(plain)]) == 0
    assert "reasoning     none marked\n" in capsys.readouterr().out


def on_terminal(tmp_path, artifact, *options, written=WRITTEN, env=None):
    """stdout, and what a terminal got that is stderr."""
    leader, follower = pty.openpty()
    reader, writer = os.pipe()
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with Path(os.devnull).open("rb") as nothing:
        process = start_forked(
            command(tmp_path, "chat", str(artifact), "--prompt", "x", *options, answers=[written]),
            (nothing.fileno(), writer, follower),
            cwd=HELPERS,
            env=kept | {"TERM": "xterm"} | (env or {}),
        )
    os.close(follower)
    os.close(writer)
    raw = b""
    try:
        while block := os.read(leader, 65536):
            raw += block
    except OSError:  # Linux says EIO when nobody writes there any more
        pass
    with os.fdopen(reader, "rb") as stdout:
        out = stdout.read()
    assert process.wait(timeout=30) == 0
    os.close(leader)
    return out.decode(), raw.decode().replace("\r", "")


def test_reasoning_is_dimmed_on_a_terminal_unless_colour_is_not_wanted(tmp_path, thinker):
    out, err = on_terminal(tmp_path, thinker)
    assert out == ANSWER + "\n"
    assert err.replace("\x1b[2m", "").replace("\x1b[0m", "") == REASONING + "\n"
    assert err.startswith("\x1b[2mB")
    assert err.count("\x1b[2m") == err.count("\x1b[0m") > 1  # word by word
    assert on_terminal(tmp_path, thinker, env={"NO_COLOR": "1"}) == (ANSWER + "\n", REASONING + "\n")
    assert on_terminal(tmp_path, thinker, "--hide-reasoning") == (ANSWER + "\n", "")


def test_reasoning_cannot_steer_the_terminal(tmp_path, thinker):
    written = "<think>\x1b]0;eid\x07\x1b[2Jrød\x9b31m</think>ok"
    shown = "␛]0;eid␇␛[2Jrød\ufffd31m\n"
    assert on_terminal(tmp_path, thinker, written=written, env={"NO_COLOR": "1"}) == ("ok\n", shown)
    assert ask(tmp_path, thinker, written=written)[2] == shown


def test_reasoning_in_the_midst_of_an_answer_begins_a_line_only_on_a_terminal(monkeypatch):
    pieces = [("", "først"), ("a", ""), ("", "så"), ("b", "")]
    for is_terminal, expected in ((True, "a\nb\n"), (False, "ab\n")):
        out, err = io.StringIO(), io.StringIO()
        out.isatty = lambda is_terminal=is_terminal: is_terminal
        monkeypatch.setattr(sys, "stdout", out)
        writer = AnswerWriter(err)
        for text, reasoning in pieces:
            writer.write(text, reasoning)
        writer.end()
        assert (out.getvalue(), err.getvalue()) == (expected, "først\nså\n")
