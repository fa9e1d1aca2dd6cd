"""--session: continued where it is there, saved when an answer or a conversation ends; mistakes lose nothing."""

import json
import os
import signal
import stat

import pytest
from scripted_cli import make_artifact
from test_cli import ANSWER, require_two_lines, run
from test_repl import CTRL_D, PROMPT, start  # noqa: F401  (a fixture)

from normistral.runtime.sessions import open_session


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))


@pytest.fixture
def artifact(tmp_path):
    return make_artifact(tmp_path / "mitt")


@pytest.fixture
def ask(tmp_path, artifact):
    """Ask one question in the session; the finished process."""

    def ask(*options, settings=None):
        return run(
            tmp_path, "chat", artifact, "--session", tmp_path / "s", "--prompt", "Hva?", *options, settings=settings
        )

    return ask


def read_messages(path):
    with open_session(path) as session:
        return [message.content for message in session.header.messages]


def test_single_answers_continue_each_other(tmp_path, ask):
    first = ask("--system", "Svar på bokmål.")
    assert (first.returncode, first.stdout.decode()) == (0, f"{ANSWER}\n")
    assert b"saving" in first.stderr
    assert read_messages(tmp_path / "s") == ["Svar på bokmål.", "Hva?", ANSWER]
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    second = ask("--json")
    assert second.returncode == 0
    assert b"(going on after 3 messages)" in second.stderr
    document = json.loads(second.stdout)
    assert document["timings"]["cached_tokens"] > 50
    assert read_messages(tmp_path / "s") == ["Svar på bokmål.", "Hva?", ANSWER, "Hva?", ANSWER]


def test_a_failed_answer_leaves_the_session(tmp_path, ask):
    ask()
    before = (tmp_path / "s").read_bytes()
    failed = ask("--prompt", "x" * 500)
    assert failed.returncode == 1
    assert (tmp_path / "s").read_bytes() == before


def test_mistakes_are_found_before_the_model_is_loaded(tmp_path, ask, artifact):
    ask()
    before = (tmp_path / "s").read_bytes()
    done = ask("--system", "Svar på nynorsk.")
    assert done.returncode == 2
    message, hint = require_two_lines(done.stderr.decode())
    assert "has a conversation with its own system message" in message
    assert "--system" in hint
    (tmp_path / "s").write_bytes(before[:-200] + b"x" + before[-199:])
    assert ask().returncode == 1  # a damaged tensor is found when it is read
    (tmp_path / "s").write_bytes(before[:100])
    done = ask()
    assert done.returncode == 1
    assert "is damaged" in require_two_lines(done.stderr.decode())[0]
    assert (tmp_path / "s").read_bytes() == before[:100]
    (tmp_path / "s").write_text("Kjære dagbok", encoding="utf-8")
    done = ask()
    assert done.returncode == 2
    assert "is no saved session" in require_two_lines(done.stderr.decode())[0]
    for wrong in (tmp_path, tmp_path / "nowhere" / "s"):
        done = run(tmp_path, "chat", artifact, "--session", wrong, "--prompt", "Hva?")
        assert done.returncode == 2
        assert "folder" in require_two_lines(done.stderr.decode())[0]


def test_a_session_of_another_artifact_is_refused_and_kept(tmp_path, ask):
    ask()
    before = (tmp_path / "s").read_bytes()
    done = ask(settings={"context_length": 500})  # stands in the manifest
    assert done.returncode == 1
    message = done.stderr.decode().partition("error: ")[2]
    assert "was saved with another artifact" in message
    assert (tmp_path / "s").read_bytes() == before


def test_a_conversation_is_saved_when_it_ends_and_goes_on(start, tmp_path):  # noqa: F811
    terminal = start([ANSWER], "--session", str(tmp_path / "s"))
    terminal.type("Hva?\r")
    terminal.expect(ANSWER)
    terminal.expect(PROMPT)
    assert not (tmp_path / "s").exists()
    terminal.type("/save\r")
    terminal.expect(r"✓ saving\s")
    assert read_messages(tmp_path / "s") == ["Hva?", ANSWER]
    terminal.type("Og?\r")
    terminal.expect(ANSWER)
    terminal.expect(PROMPT)
    terminal.type(CTRL_D)
    assert terminal.end() == 0
    assert read_messages(tmp_path / "s") == ["Hva?", ANSWER, "Og?", ANSWER]
    again = start([ANSWER], "--session", str(tmp_path / "s"))
    again.type("/undo\r")
    again.expect(PROMPT)
    again.type("/stats\r")
    again.expect("messages +2 in")
    again.type("/exit\r")
    assert again.end() == 0
    assert read_messages(tmp_path / "s") == ["Hva?", ANSWER]


@pytest.mark.parametrize("when", ["at the prompt", "in an answer"])
@pytest.mark.parametrize("end", ["SIGTERM", "SIGHUP", "closed"])
def test_a_session_is_saved_when_the_terminal_is_closed(start, tmp_path, end, when):  # noqa: F811
    terminal = start([ANSWER, "a " * 100], "--session", str(tmp_path / "s"), pause_s=0.05)
    terminal.type("Hva?\r")
    terminal.expect(ANSWER)
    terminal.expect(PROMPT)
    if when == "in an answer":
        terminal.type("Og?\r")
        terminal.expect("a a a")
    if end == "closed":
        terminal.hang_up()
        assert terminal.process.wait(timeout=30) != 0 or when == "at the prompt"  # there it may be read as Ctrl-D
    else:
        os.kill(terminal.process.pid, signal.Signals[end])
        assert terminal.end() == 128 + signal.Signals[end]
    saved = read_messages(tmp_path / "s")
    assert saved[:2] == ["Hva?", ANSWER]
    if when == "in an answer":
        assert saved[2] == "Og?"
        assert saved[3].startswith("a a a")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".s")] == []


def test_save_alone_needs_a_session(start):  # noqa: F811
    terminal = start([ANSWER])
    terminal.type("/save\r")
    terminal.expect("no file is named")


def test_a_session_that_cannot_be_saved_at_the_end_is_not_lost(start, tmp_path):  # noqa: F811
    folder = tmp_path / "mappe"
    folder.mkdir()
    terminal = start([ANSWER], "--session", str(folder / "s"))
    terminal.type("Hva?\r")
    terminal.expect(ANSWER)
    terminal.expect(PROMPT)
    folder.rmdir()
    terminal.type(CTRL_D)
    terminal.expect("cannot write .*there is no folder")
    terminal.expect("leave again to give it up")
    terminal.expect(PROMPT)
    terminal.type(f"/save {tmp_path / 'samtale.json'}\r")
    terminal.expect("saved 2 messages")
    terminal.expect(PROMPT)  # before it is there, Ctrl-D would be the terminal's own
    terminal.type(CTRL_D)
    assert terminal.end() == 0
