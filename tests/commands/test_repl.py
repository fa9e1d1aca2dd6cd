"""The conversation at a real pseudo-terminal, and the files it saves."""

import json
import os
import re
import stat
import time

import pytest
from pseudo_terminal import WIDE, Terminal
from scripted_cli import command, make_artifact
from scripted_models import TAG_TOKENS

from normistral.commands.line_editor import strip_text_block, wants_more
from normistral.commands.saved_chats import load_conversation, save_conversation
from normistral.errors import NormistralError, UsageError
from normistral.runtime.structured.structure import Structure

PROMPT = r"(\A|\n)>"
CTRL_C, CTRL_D, ALT_ENTER, ENTER = "\x03", "\x04", "\x1b\r", "\r"


@pytest.fixture
def start(tmp_path):
    """Start a conversation with these answers and command line options."""
    started = []

    def start(answers, *options, env=None, reasoning=None, columns=WIDE, **settings):
        artifact = tmp_path / "mitt"
        if not artifact.exists():
            make_artifact(artifact, reasoning=reasoning)
        terminal = Terminal(
            command(tmp_path, "chat", str(artifact), *options, answers=answers, **settings),
            {"NORMISTRAL_HOME": str(tmp_path / "home"), **(env or {})},
            columns,
        )
        started.append(terminal)
        terminal.expect(PROMPT)
        return terminal

    yield start
    for terminal in started:
        terminal.close()


def save(terminal, path):
    """Save the conversation; its messages as (role, content)."""
    terminal.type(f"/save! {path}\r")
    terminal.expect(r"\(saved \d+ messages")
    terminal.expect(PROMPT)
    return [tuple(message.values()) for message in json.loads(path.read_text(encoding="utf-8"))["messages"]]


def test_a_conversation_from_greeting_to_goodbye(start):
    terminal = start(["Blåbær på brød 😀", "Ja, på Østlandet."])
    terminal.type("Hva spiser du?\r")
    terminal.expect("Blåbær på brød 😀\n")
    status = terminal.expect(r"tokens of context left")
    assert re.search(r"scripted · [\d.]+ tokens/s · first token after [\d.]+ s · \d+ of 400 tokens", status)
    terminal.type("Sikker?\r")
    terminal.expect("Ja, på Østlandet.\n")
    terminal.expect(PROMPT)
    terminal.type(CTRL_D)
    assert terminal.end() == 0


def test_ctrl_c_stops_an_answer_within_a_token_and_the_session_goes_on(start, tmp_path):
    terminal = start(["a " * 100, "ferdig"], pause_s=0.05)
    terminal.type("Skriv langt\r")
    terminal.expect("a a a")
    pressed = time.monotonic()
    terminal.type(CTRL_C)
    terminal.expect(r"\(stopped")
    assert time.monotonic() - pressed < 2
    terminal.expect(PROMPT)
    terminal.type("Og nå?\r")
    terminal.expect("ferdig\n")
    terminal.expect(PROMPT)
    messages = save(terminal, tmp_path / "lagret.json")
    assert [role for role, _ in messages] == ["user", "assistant", "user", "assistant"]
    assert re.fullmatch("(a ?){3,40}", messages[1][1])


def test_ctrl_c_while_the_prompt_is_read_stops_too(start):
    terminal = start(["svar"], pause_s=2, context_length=400)  # the prompt's last chunk alone takes two seconds
    terminal.type("hei\r")
    terminal.expect("hei")
    time.sleep(1)
    terminal.type(CTRL_C)
    assert "svar" not in terminal.expect(r"\(stopped")
    terminal.expect(PROMPT)
    terminal.type("/exit\r")
    assert terminal.end() == 0


def test_ctrl_c_at_the_prompt_clears_the_line(start):
    terminal = start(["svar"])
    terminal.type("bare tull")
    terminal.expect("bare tull")
    terminal.type(CTRL_C)
    terminal.expect(PROMPT)
    terminal.type("hei\r")
    terminal.expect("svar\n")
    terminal.expect(PROMPT)
    terminal.type("/stats\r")
    terminal.expect(r"messages +2 in")


def test_messages_of_several_lines(start, tmp_path):
    terminal = start(["ok"])
    for typed in (
        f"en{ALT_ENTER}to{ENTER}",
        f"en\\{ENTER}to{ENTER}",
        f'"""{ENTER}en{ENTER}to{ENTER}"""{ENTER}',
        f"\x1b[200~en\nto\x1b[201~{ENTER}",  # a terminal marks pasted text like this
    ):
        terminal.type(typed)
        terminal.expect("ok\n")
        terminal.expect(PROMPT)
    messages = save(terminal, tmp_path / "lagret.json")
    assert [content for role, content in messages if role == "user"] == ["en\nto"] * 4


def test_output_cannot_steer_the_terminal(start):
    terminal = start(["\x1b]0;eid\x07\x1b[2Jrød\x9b31m"])
    terminal.type("hei\r")
    terminal.expect(r"␛\]0;eid␇␛\[2Jrød\ufffd31m\n")
    assert b"\x1b]0;" not in terminal.raw
    assert b"\x07" not in terminal.raw


def test_system_undo_and_reset(start, tmp_path):
    terminal = start(["en", "to", "tre"], "--system", "Vær snill")
    file = tmp_path / "lagret.json"
    for message, answer in (("1", "en"), ("2", "to")):
        terminal.type(f"{message}\r")
        terminal.expect(f"{answer}\n")
        terminal.expect(PROMPT)
    terminal.type("/undo\r")
    terminal.expect("taken back")
    terminal.type("/system Svar på nynorsk\r")
    terminal.expect("is set")
    assert save(terminal, file) == [("system", "Svar på nynorsk"), ("user", "1"), ("assistant", "en")]
    terminal.type("/reset\r")
    terminal.expect("new conversation")
    assert save(terminal, file) == [("system", "Svar på nynorsk")]
    terminal.type('/system ""\r')
    terminal.expect("is removed")
    terminal.type("/undo\r")
    terminal.expect("nothing to take back")
    assert save(terminal, file) == []


def test_a_saved_conversation_goes_on_elsewhere(start, tmp_path):
    file = tmp_path / "med blank.json"
    first = start(["Oslo.", "Bergen."])
    first.type("Hovedstad?\r")
    first.expect("Oslo.\n")
    first.type(f"/save {file}\r")
    first.expect(r"\(saved 2 messages")
    first.type(f"/save {file}\r")
    first.expect("error: .* is there already\nhint: overwrite it with: /save! ")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.glob("*blank*")) == ["med blank.json"]
    second = start(["Oslo.", "Bergen."])
    second.type(f"/load {file}\r")
    second.expect(r"\(loaded 2 messages\)")
    second.type("Nest størst?\r")
    second.expect("Bergen.\n")  # the second answer: the first turn is there


def test_mistakes_are_explained_and_cost_nothing(start):
    terminal = start(["svar"])
    for typed, expected in (
        ("/tull", "error: no command /tull\nhint: /help"),
        ("/hlep", r"error: no command /hlep\nhint: did you mean /help\?"),
        ("/SAVE x", r"hint: did you mean /save\?"),
        ("/", "error: no command /\n"),
        ("/reset nå", "error: /reset takes nothing after it"),
        ("/save", "error: no file is named"),
        ("/load /nowhere/x.json", "error: cannot read /nowhere/x.json: No such file"),
        ("/save /nowhere/x.json", "error: cannot write /nowhere/x.json: there is no folder"),
    ):
        terminal.type(f"{typed}\r")
        terminal.expect(expected)
        terminal.expect(PROMPT)
    terminal.type("/help\r")
    listed = terminal.expect("Ctrl-R")
    assert "/quit" not in listed  # the same as /exit
    for name in ("help", "reset", "system", "undo", "save", "load", "stats", "exit"):
        assert f"/{name}" in listed
    terminal.type("//tull\r")  # a message
    terminal.expect("svar\n")


@pytest.mark.parametrize("typed", ["exit", " Quit ", "/quit"])
def test_words_for_leaving_leave(start, typed):
    terminal = start(["svar"])
    terminal.type(f"{typed}\r")
    assert terminal.end() == 0
    assert "svar" not in terminal.text


def test_a_message_about_leaving_is_a_message(start):
    terminal = start(["svar"])
    terminal.type("exit code 1?\r")
    terminal.expect("svar\n")


def test_stats_are_in_words(start):
    terminal = start(["Ja, på Østlandet."])
    terminal.type("hei\r")
    terminal.expect("Østlandet.\n")
    terminal.type("/stats\r")
    shown = terminal.expect(r"(?s)read +\d+ tokens, 0 of them known from before\n")
    assert re.search(r"messages +2 in this conversation\n", shown)
    assert re.search(r"room +\d+ of 400 tokens are left; a token is ", shown)
    assert re.search(
        r"last answer +\d+ tokens at [\d.]+ tokens/s, the first after [\d.]+ s; prompt of \d+ tokens", shown
    )
    assert "=" not in shown  # settings of the engine


# Widths

TEXT = (
    "Menneskerettighetsorganisasjonene på Østlandet spiser blåbærsyltetøy på brød, og 日本語のテキスト er "
    "bredere 😀 👨‍👩‍👧‍👦 enn e\u0301n skulle tro.\n\n    - innrykk på en lang linje som må brytes et sted\nslutt"
)


def pieces(text: str) -> list[str]:
    """What may stand alone on a line: words, and ideographs with the punctuation after them."""
    return re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\s\u3040-\u30ff\u4e00-\u9fff]+", text)


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_an_answer_breaks_between_words(start, columns):
    from wcwidth import wcswidth

    terminal = start([TEXT], columns=columns)
    terminal.type("hei\r")
    shown = terminal.expect(r"(?s)Mennesker.*slutt\n")
    lines = shown[shown.index("Mennesker") :].splitlines()
    assert max(wcswidth(line) for line in lines) < columns
    assert [piece for line in lines for piece in pieces(line)] == pieces(TEXT)
    assert "    - innrykk" in shown


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_help_stats_and_errors_break_between_words(start, columns):
    wide = start(["svar"], columns=WIDE)
    narrow = start(["svar"], columns=columns)
    for typed, body in (
        ("/help", r"  /help +this list(?s:.*)Ctrl-R\s+searches\s+them"),
        ("/stats", r"model\s+scripted,(?s:.*)part\s+of\s+one"),
        ("/hlep", r"error: no(?s:.*)sends\s+a\s+/"),
    ):
        shown = []
        for terminal in (wide, narrow):
            terminal.type(f"{typed}\r")
            shown.append(re.search(body, terminal.expect(body))[0])
        assert shown[0].split() == shown[1].split(), typed
        assert max(map(len, shown[1].splitlines())) <= columns


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_status_line_fits(start, columns):
    terminal = start(["svar"], columns=columns)
    terminal.type("hei\r")
    terminal.expect("svar\n")
    status = terminal.expect(r"tokens(?: of context)? left").splitlines()[-1]
    assert len(status) < columns
    assert re.search(r"\d of 400 tokens|\d tokens", status)


def test_a_window_that_changes_its_size_is_followed(start):
    terminal = start(["ord " * 30], columns=120)
    for columns in (120, 40):
        terminal.resize(columns)
        terminal.type("hei\r")
        lines = re.findall(r"(?m)^(?:ord ?)+$", terminal.expect(r"(?s)(?:(?:ord\s+){30}){1}"))
        assert columns - 5 < max(map(len, lines)) < columns
        terminal.expect(PROMPT)


def test_a_full_context_warns_then_explains(start):
    terminal = start(["svar"], context_length=110)
    terminal.type("x" * 75 + ENTER)
    terminal.expect(r"warning: only \d+ tokens of context are left; /reset or /undo makes room")
    terminal.expect(PROMPT)
    terminal.type("y" * 40 + ENTER)
    terminal.expect(r"error: the conversation takes \d+ tokens; scripted has room for 110")
    terminal.expect("hint: .*/undo.*/reset.*--overflow")
    terminal.expect(PROMPT)
    terminal.type("/reset\r")
    terminal.type("hei\r")
    terminal.expect("svar\n")


def test_dropped_turns_are_said(start):
    terminal = start(["svar"], "--overflow", "drop-oldest", context_length=130)
    for _ in range(2):
        terminal.type("x" * 40 + ENTER)
        terminal.expect("svar\n")
        terminal.expect(PROMPT)
    assert re.search(r"warning: \d+ tokens are left out for lack of room: messages 1 to 2\n+svar", terminal.text)


def test_the_history_is_the_users_own(start, tmp_path):
    terminal = start(["svar"])
    terminal.type("hemmelig\r")
    terminal.expect("svar\n")
    terminal.type("/exit\r")
    assert terminal.end() == 0
    file = tmp_path / "home" / "history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "+hemmelig" in file.read_text(encoding="utf-8")
    later = start(["svar"])
    later.type("\x1b[A\x1b[A")  # up: first /exit, then the message
    later.expect("hemmelig")


def test_no_history_leaves_no_trace(start, tmp_path):
    terminal = start(["svar"], "--no-history")
    terminal.type("hemmelig\r")
    terminal.expect("svar\n")
    terminal.type("/exit\r")
    assert terminal.end() == 0
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"hemmelig" not in path.read_bytes()


def test_a_history_that_cannot_be_kept_is_said_and_the_chat_goes_on(start, tmp_path):
    (tmp_path / "home").write_text("a file, not a folder")
    terminal = start(["svar"])
    assert "warning: messages are not remembered" in terminal.text
    terminal.type("hei\r")
    terminal.expect("svar\n")


def test_typed_bytes_that_are_no_text_do_not_end_the_session(start):
    terminal = start(["svar"])
    os.write(terminal._leader, b"bl\xe5 \r")
    terminal.expect("svar\n")
    terminal.expect(PROMPT)


def test_no_colour_when_it_is_not_wanted(start):
    terminal = start(["svar"], env={"NO_COLOR": "1"})
    terminal.type("/tull\r")
    terminal.expect("no command")
    assert b"\x1b[1;31m" not in terminal.raw
    coloured = start(["svar"])
    coloured.type("/tull\r")
    coloured.expect("no command")
    assert b"\x1b[1;31merror:" in coloured.raw


# Thinking models

THOUGHT = " <think> Hm, på\x1b[2J</think> Oslo."


def test_reasoning_is_dimmed_before_the_answer_and_not_remembered(start, tmp_path):
    terminal = start([THOUGHT], reasoning=TAG_TOKENS)
    terminal.type("Hovedstad?\r")
    terminal.expect(r"Hm, på␛\[2J\nOslo\.\n")
    dimmed = "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", terminal.raw.decode().partition("Oslo.")[0], re.DOTALL))
    assert dimmed.endswith("Hm, på␛[2J")
    terminal.expect(PROMPT)
    assert save(terminal, tmp_path / "lagret.json") == [("user", "Hovedstad?"), ("assistant", "Oslo.")]


def test_hidden_reasoning_is_one_line(start):
    terminal = start([THOUGHT], "--hide-reasoning", reasoning=TAG_TOKENS)
    terminal.type("Hovedstad?\r")
    shown = terminal.expect(r"\(thinking \.\.\.\)\nOslo\.\n")
    assert "Hm" not in shown
    assert terminal.text.count("(thinking ...)") == 1


def test_an_answer_that_is_missing_is_said_to_be(start, tmp_path):
    terminal = start(["<think>" + "a " * 75, "Oslo."], "--max-new-tokens", "100", reasoning=TAG_TOKENS, pause_s=0.02)
    terminal.type("Hovedstad?\r")
    terminal.expect("a a a")
    terminal.type(CTRL_C)
    terminal.expect(r"warning: there is no answer: the reasoning did not end \(it was stopped\)")
    terminal.expect("--max-reasoning-tokens N")
    terminal.expect(PROMPT)
    terminal.type("/undo\r")
    terminal.expect("taken back")
    terminal.type("Hovedstad?\r")
    terminal.expect(r"the reasoning did not end \(--max-new-tokens was reached\)")
    terminal.expect(PROMPT)
    terminal.type("Hovedstad?\r")
    terminal.expect(r"\nOslo\.\n")
    messages = save(terminal, tmp_path / "lagret.json")
    assert [content for _, content in messages] == ["Hovedstad?", "", "Hovedstad?", "Oslo."]


# Saved conversations

MESSAGES = [{"role": "user", "content": "Hei på deg"}, {"role": "assistant", "content": "Hallo"}]


def test_what_was_saved_is_loaded(tmp_path):
    file = tmp_path / "lagret.json"
    save_conversation(str(file), MESSAGES, artifact="mitt", settings={"seed": 3}, overwrite=False)
    loaded = load_conversation(str(file))
    assert (loaded.messages, loaded.artifact) == (MESSAGES, "mitt")
    assert json.loads(file.read_text(encoding="utf-8"))["settings"] == {"seed": 3}
    assert "på" in file.read_text(encoding="utf-8")


def test_settings_of_a_structured_conversation_are_saved(tmp_path):
    file = tmp_path / "lagret.json"
    structure = Structure.choice(["ja", "nei"])
    save_conversation(str(file), MESSAGES, artifact="mitt", settings={"structure": structure}, overwrite=False)
    saved = json.loads(file.read_text(encoding="utf-8"))["settings"]
    assert saved == {"structure": {"kind": "choice", "text": '["ja", "nei"]'}}


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / "lagret.json"
    save_conversation(str(file), MESSAGES, artifact="mitt", settings={}, overwrite=False)
    before = file.read_bytes()
    with pytest.raises(UsageError, match="there already"):
        save_conversation(str(file), [], artifact="mitt", settings={}, overwrite=False)
    with pytest.raises(TypeError):
        save_conversation(str(file), [], artifact="mitt", settings={"x": object()}, overwrite=True)
    with pytest.raises(UsageError, match="folder"):
        save_conversation(str(tmp_path), [], artifact="mitt", settings={}, overwrite=True)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: [],
        lambda saved: saved | {"format": "other"},
        lambda saved: saved | {"version": 2},
        lambda saved: saved | {"messages": "Hei"},
        lambda saved: saved | {"artifact": 3},
        lambda saved: saved | {"messages": ["Hei"]},
        lambda saved: saved | {"messages": [{"role": "user"}]},
        lambda saved: saved | {"messages": [{"role": "user", "content": 3}]},
        lambda saved: saved | {"messages": [{"role": [], "content": "x"}]},
        lambda saved: saved | {"messages": [{"role": "tool", "content": "x"}]},
        lambda saved: saved | {"messages": [*MESSAGES, {"role": "system", "content": "x"}]},
    ],
)
def test_what_is_no_saved_conversation_is_refused(tmp_path, change):
    file = tmp_path / "lagret.json"
    save_conversation(str(file), MESSAGES, artifact="mitt", settings={}, overwrite=False)
    file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(UsageError, match="is no saved conversation"):
        load_conversation(str(file))


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_bytes_that_are_no_json_are_refused(tmp_path, raw):
    file = tmp_path / "lagret.json"
    file.write_bytes(raw)
    with pytest.raises(UsageError, match="is no saved conversation"):
        load_conversation(str(file))


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(NormistralError, match="No such file"):
        load_conversation(str(tmp_path / "x"))


# Lines


@pytest.mark.parametrize("text", ["en\\", '"""', '"""en', '"""\nen\n', '  """en'])
def test_enter_goes_on(text):
    assert wants_more(text)


@pytest.mark.parametrize("text", ["", "en", '"""en"""', '"""\nen\n"""', 'han sa """', '"" og "'])
def test_enter_sends(text):
    assert not wants_more(text)


def test_a_text_block_loses_its_marks_only():
    assert strip_text_block('"""\n  en\nto\n"""') == "  en\nto"
    assert strip_text_block('si """ igjen') == 'si """ igjen'
    assert strip_text_block('"""') == '"""'


def test_a_history_that_cannot_be_written_any_more_costs_no_conversation(start, tmp_path):
    terminal = start(["svar"])
    history = next((tmp_path / "home").rglob("history"))
    history.unlink()
    history.mkdir()
    for message in ("hei", "hallo"):
        terminal.type(f"{message}\r")
        terminal.expect("warning: messages are not remembered: ")
        terminal.expect("svar\n")
        terminal.expect(PROMPT)
    terminal.type(CTRL_D)
    assert terminal.end() == 0
