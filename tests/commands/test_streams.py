"""Closed, full and broken streams, and text in foreign clothes: what a shell can do to a command."""

import subprocess
from pathlib import Path

import pytest
from scripted_cli import HELPERS, command, make_artifact
from scripted_models import TAG_TEXTS
from test_cli import ANSWER, require_two_lines

from normistral.batch.documents import Row, read_document
from normistral.commands.answer import read_structure
from normistral.commands.console import decode_argument
from normistral.commands.options import StructureArgs
from normistral.commands.saved_chats import load_conversation, save_conversation
from normistral.errors import UsageError
from normistral.evaluation.windows import read_text
from normistral.server.auth import read_keys
from normistral.text_input import decode_text

MARK = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))


@pytest.fixture
def artifact(tmp_path):
    return make_artifact(tmp_path / "scripted")


def shell(tmp_path, redirection, *arguments, stdin=b"", answers=(ANSWER,)):
    """Run a command with a redirection of the shell's."""
    words = command(tmp_path, *map(str, arguments), answers=list(answers))
    script = ["bash", "-c", f'exec "$@" {redirection}', "bash", *words]
    return subprocess.run(script, input=stdin, capture_output=True, timeout=60, cwd=HELPERS)


@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "{}", "--prompt", "x"),
        ("generate", "{}", "--prompt", "x"),
        ("models",),
        ("--version",),
        ("--help",),
        ("export", "demo", "never-written"),
        ("eval", "{}", "--text", "none.txt"),
    ],
)
def test_a_closed_stdout_is_named(tmp_path, artifact, arguments):
    done = shell(tmp_path, ">&-", *[argument.format(artifact) for argument in arguments])
    message, hint = require_two_lines(done.stderr.decode())
    assert (done.returncode, message) == (1, "stdout is closed: there is nowhere to write the result")
    assert "> /dev/null" in hint
    assert not (HELPERS / "never-written").exists()


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_a_closed_stdin_is_no_prompt(tmp_path, artifact, name):
    done = shell(tmp_path, "<&-", name, artifact)
    assert done.returncode == 2
    assert "--prompt TEXT" in require_two_lines(done.stderr.decode())[1]


def test_a_closed_stderr_leaves_the_answer_alone(tmp_path, artifact):
    done = shell(tmp_path, "2>&-", "chat", artifact, "--prompt", "x", "--max-new-tokens", "2", "--stats")
    assert (done.returncode, done.stdout.decode()) == (0, ANSWER[:2] + "\n")
    done = shell(tmp_path, "2>&-", "chat", "no such artifact", "--prompt", "x")
    assert (done.returncode, done.stdout) == (1, b"")


def test_with_everything_closed_nothing_is_written_into_other_files(tmp_path, artifact):
    done = shell(tmp_path, "<&- >&- 2>&-", "chat", artifact, "--prompt", "x")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_named_and_a_full_log_stops_nothing(tmp_path, artifact):
    for arguments in (("chat", artifact, "--prompt", "x"), ("--version",), ("info", artifact, "--json")):
        done = shell(tmp_path, ">/dev/full", *arguments)
        message, hint = require_two_lines(done.stderr.decode())
        assert (done.returncode, message) == (1, "the disk is full")
        assert "free some space" in hint
    done = shell(tmp_path, "2>/dev/full", "chat", artifact, "--prompt", "x", "--max-new-tokens", "2", "--stats")
    assert (done.returncode, done.stdout.decode()) == (0, ANSWER[:2] + "\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2> >(true)"])
def test_a_reasoning_that_nobody_reads_stops_no_answer(tmp_path, redirection):
    thinker = make_artifact(tmp_path / "tenker", reasoning=TAG_TEXTS)
    arguments = ("chat", thinker, "--prompt", "x")
    done = shell(tmp_path, redirection, *arguments, answers=[f"<think> {'Hm. ' * 20}</think> {ANSWER}"])
    assert (done.returncode, done.stdout.decode()) == (0, ANSWER + "\n")


# Text


def test_every_reader_leaves_out_one_mark(tmp_path, artifact):
    text = "Blåbær på Åsen"
    marked = MARK + text.encode()
    assert decode_text(marked, "it") == text
    assert decode_text(MARK + marked, "it") == "\ufeff" + text  # only the first is no text
    assert decode_argument("\ufeff" + text) == text
    path = tmp_path / "text.txt"
    path.write_bytes(marked)
    assert read_text(path) == text
    assert read_document(tmp_path, Row(1, "text.txt"))["text"] == text
    grammar = tmp_path / "grammatikk.lark"
    grammar.write_bytes(MARK + 'start: "blåbær"'.encode())
    assert read_structure(StructureArgs(grammar=grammar)).text == 'start: "blåbær"'
    path.write_bytes(MARK + ("k" * 20 + " åse\n").encode())
    path.chmod(0o600)
    assert read_keys(path, {}).tenant("Bearer " + "k" * 20) == "åse"
    saved = save_conversation(
        str(tmp_path / "samtale.json"), [{"role": "user", "content": text}], artifact="x", settings={}, overwrite=False
    )
    saved.write_bytes(MARK + saved.read_bytes())
    assert load_conversation(str(saved)).messages[0]["content"] == text


@pytest.mark.parametrize("mark", [b"", MARK])
def test_a_mark_never_reaches_the_model(tmp_path, artifact, mark):
    plain = shell(tmp_path, "", "chat", artifact, "--stats", stdin="Blåbær".encode() + b"\n")
    found = shell(tmp_path, "", "chat", artifact, "--stats", stdin=mark + "Blåbær".encode() + b"\n")
    assert found.stdout == plain.stdout
    assert _prompt_tokens(found) == _prompt_tokens(plain)
    empty = shell(tmp_path, "", "chat", artifact, stdin=mark)
    assert (empty.returncode, require_two_lines(empty.stderr.decode())[0]) == (2, "the prompt is empty")


def _prompt_tokens(done):
    return done.stderr.decode().partition("prompt")[2].split(",")[0]


@pytest.mark.parametrize(
    ("encoding", "named", "convert"),
    [
        ("utf-16", "UTF-16", "utf-16"),
        ("utf-16-le", "UTF-16LE", "utf-16le"),
        ("utf-16-be", "UTF-16BE", "utf-16be"),
        ("utf-32", "UTF-32", "utf-32"),
        ("latin-1", "not UTF-8: byte 0xe5 at position 2", "latin1"),
    ],
)
def test_other_encodings_are_named(encoding, named, convert):
    raw = "blåbær på Åsen".encode(encoding)
    with pytest.raises(UsageError, match=named) as caught:
        decode_text(raw, "the input")
    assert f"iconv -f {convert} -t utf-8" in caught.value.hint
    assert raw.decode(convert) == "blåbær på Åsen"


def test_positions_count_the_mark_and_zeros_alone_are_no_encoding():
    with pytest.raises(UsageError, match="byte 0xff at position 4"):
        decode_text(MARK + b"a\xff", "the input")
    assert decode_text(b"a\0b", "the input") == "a\0b"
