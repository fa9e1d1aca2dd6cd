"""Every command that takes a path, with every kind of path that cannot be: one error and one hint that fit, no wait."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted import AS_ROOT, plant
from sample_artifacts import write_artifact

from normistral.cli import main
from normistral.errors import EngineError

# Where PATH stands; ARTIFACT is a folder with a manifest, TEXT a text.
COMMANDS = {
    "export MODEL": ["export", "PATH", "OUT"],
    "export OUTPUT": ["export", "MODEL", "PATH"],
    "export --force": ["export", "MODEL", "PATH", "--force"],
    "export --chat-template": ["export", "MODEL", "OUT", "--chat-template", "PATH"],
    "chat ARTIFACT": ["chat", "PATH", "--prompt", "hei"],
    "chat --session": ["chat", "ARTIFACT", "--prompt", "hei", "--session", "PATH"],
    "chat --json-schema": ["chat", "ARTIFACT", "--prompt", "hei", "--json-schema", "PATH"],
    "chat --grammar": ["chat", "ARTIFACT", "--prompt", "hei", "--grammar", "PATH"],
    "generate ARTIFACT": ["generate", "PATH", "--prompt", "hei"],
    "batch ARTIFACT": ["batch", "PATH", "TEXT", "OUT", "--instruction", "{text}"],
    "batch INPUT": ["batch", "ARTIFACT", "PATH", "OUT", "--instruction", "{text}"],
    "batch OUTPUT": ["batch", "ARTIFACT", "TEXT", "PATH", "--instruction", "{text}", "--force"],
    "serve ARTIFACT": ["serve", "PATH"],
    "serve --api-key-file": ["serve", "ARTIFACT", "--api-key-file", "PATH"],
    "info": ["info", "PATH"],
    "info --check": ["info", "PATH", "--check"],
    "bench ARTIFACT": ["bench", "PATH"],
    "bench --report": ["bench", "ARTIFACT", "--report", "PATH.md"],
    "bench --json": ["bench", "ARTIFACT", "--json", "PATH"],
    "eval ARTIFACT": ["eval", "PATH", "--text", "TEXT"],
    "eval --text": ["eval", "ARTIFACT", "--text", "PATH"],
    "eval --reference": ["eval", "ARTIFACT", "--text", "TEXT", "--reference", "PATH"],
    "eval --json": ["eval", "ARTIFACT", "--text", "TEXT", "--json", "PATH"],
    "tune": ["tune", "PATH"],
    "tune --forget": ["tune", "PATH", "--forget"],
    "bundle ARTIFACT": ["bundle", "PATH", "OUT"],
    "bundle FILE": ["bundle", "ARTIFACT", "PATH", "--force"],
    "bundle --sign-with": ["bundle", "ARTIFACT", "OUT", "--sign-with", "PATH"],
    "bundle --wheels": ["bundle", "ARTIFACT", "OUT", "--wheels", "PATH"],
    "doctor": ["doctor", "PATH"],
}
NAMES = {
    "NUL": "a\0b",
    "long": "x" * 5000,
    "long part": "x" * 300,
    "deep": "x/" * 2500 + "x",
    "no UTF-8": "none/\udcff\udc80",
    "no character": "a\ud800",
    "newline": "none\nsuch/a\nb",
    "escape": "none/\x1b[31m",
    "missing": "none/such/name",
    "below a file": "file/x",
    "user": "~nosuchuser/x",
}
KINDS = ["circle", "dangling link", "fifo", "socket", pytest.param("device", marks=AS_ROOT)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: what the commands name is in it."""
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    write_artifact(tmp_path / "ARTIFACT")
    (tmp_path / "TEXT").write_text("tekst")
    (tmp_path / "file").write_text("fil")
    (tmp_path / "MODEL").mkdir()
    return tmp_path


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """A command that waits for a FIFO fails instead."""

    def stop(number: int, frame: Any) -> None:
        raise AssertionError("it waits")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints that cannot be done: two lines."""
    code = main(arguments)
    printed = capsys.readouterr()
    assert code in (1, 2), printed
    lines = printed.err[printed.err.index("error:") :].splitlines()  # progress may stand before
    assert [line.partition(" ")[0] for line in lines] == ["error:", "hint:"], printed.err
    assert "bug in normistral" not in printed.err
    assert "\x1b" not in printed.err
    assert printed.out == ""
    return printed.err


def named(arguments: list[str], name: str) -> list[str]:
    return [argument.replace("PATH", name) for argument in arguments]


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
def test_names_that_cannot_be(
    place: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in place.iterdir())
    for kind, name in NAMES.items():
        said = refusal(named(arguments, name), capsys)
        assert len(said) < 12_000, kind
        for wrong in ("permissions", "disk is full", "Traceback"):
            assert wrong not in said, (kind, said[-300:])
    assert sorted(path.name for path in place.iterdir() if path.name != "home") == before


@pytest.mark.parametrize("name", ["", "-"])
def test_a_name_of_nothing_is_not_this_folder(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As `batch demo "$FILE" out.jsonl` has it where FILE is not set; and - would be made as a file."""
    before = sorted(place.iterdir())
    for key in ("export OUTPUT", "batch INPUT", "batch OUTPUT", "eval --text", "bundle FILE", "bundle --wheels"):
        assert f"{name!r} names no file or folder" in refusal(named(COMMANDS[key], name), capsys), key
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
def test_what_is_no_file_or_folder(
    place: Path, arguments: list[str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "fifo" and {"--json", "--report"} & set(arguments):
        return  # results may go there (test_files)
    if kind == "dangling link" and arguments == ["doctor", "PATH"]:
        kind = "circle"
    plant(place / "odd", kind)
    plant(place / "odd.md", kind)
    status = (place / "odd").lstat()
    refusal(named(arguments, "odd"), capsys)
    assert (status.st_ino, status.st_mode) == ((place / "odd").lstat().st_ino, (place / "odd").lstat().st_mode)


@pytest.mark.parametrize("value", ["~nosuchuser", "x" * 5000, "file/x", "circle/x"])
@pytest.mark.parametrize("arguments", [["models"], ["info", "x"], ["chat", "--prompt", "x"], ["tune", "x"]])
def test_a_home_that_cannot_be(
    place: Path,
    value: str,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(place / "circle", "circle")
    monkeypatch.setenv("NORMISTRAL_HOME", value)
    code = main(arguments)
    printed = capsys.readouterr().err
    assert "bug in normistral" not in printed
    assert code != 0 or value in ("file/x", "circle/x", "x" * 5000)  # a store that is not there is empty
    if value.startswith("~"):
        assert "no such user" in printed


@pytest.mark.parametrize(
    "error",
    [
        ImportError("/x/tokenizers.abi3.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        RuntimeError("std::bad_alloc"),
        EngineError("OpenVINO could not load x on CPU: Loading input model", "check the artifact"),
    ],
)
def test_a_limit_of_memory_is_named(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ulimit -v`: neither a bug nor a damaged artifact."""

    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setattr("normistral.cli._invoke", fail)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (400_000_000, 400_000_000))
    assert "400 MB of memory at most (ulimit -v)" in refusal(["models"], capsys)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (-1, -1))
    assert "ulimit" not in refusal(["models"], capsys)
