"""The help at any width, and what the shell completes."""

import os
import re
import subprocess
import sys

import pytest
from fork_server import run_forked
from pseudo_terminal import WIDE, Terminal
from sample_artifacts import write_artifact

NORMISTRAL = [sys.executable, "-m", "normistral"]


def shown(*arguments: str, columns: int) -> str:
    terminal = Terminal([*NORMISTRAL, *arguments], {"NO_COLOR": "1"}, columns)
    assert terminal.end() == 0
    terminal.close()
    return terminal.text


def words(text: str) -> set[str]:
    return set(re.sub("[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["export", "--help"]], ids=" ".join)
def test_no_word_of_the_help_is_broken(arguments):
    whole = words(shown(*arguments, columns=WIDE))
    for columns in (40, 80, 120):
        text = shown(*arguments, columns=columns)
        assert max(map(len, text.splitlines())) <= columns
        strange = {word for word in words(text) - whole if not word.endswith(":")}  # titles of plain help end in one
        assert strange <= {"/", "-h,"}, columns


def test_wide_terminals_get_frames_and_brackets_stay():
    text = shown("export", "--help", columns=120)
    assert "╭─ Options" in text
    assert 'pip install "normistral[export]"' in text


def complete(words: str, home, **environment) -> subprocess.CompletedProcess:
    """What bash gets for the last of these words."""
    asked = {"_NORMISTRAL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    environment = os.environ | asked | {"NORMISTRAL_HOME": str(home)} | environment
    return run_forked(NORMISTRAL, cwd=home, env=environment, text=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("normistral ch", ["chat"]),
        ("normistral chat ", ["blåbær", "mitt", "demo", "7b-warm-instruct"]),
        ("normistral chat m", ["mitt"]),
        ("normistral info 7b-s", ["7b-scratch"]),
        ("normistral serve mi", ["mitt"]),
        ("normistral rm ", ["blåbær", "mitt"]),
        ("normistral rm d", []),
        ("normistral export 11b-w", ["11b-warm"]),
        ("normistral export demo --recipe ", ["fast", "balanced", "best"]),
        ("normistral export demo --format o", ["openvino", "onnx"]),
        ("normistral chat --overf", ["--overflow"]),
        ("normistral tune mitt --profile ", ["chat", "documents", "batch"]),
        ("normistral chat ./", []),
    ],
)
def test_completion(tmp_path, words, expected):
    for name in ("mitt", "blåbær"):
        write_artifact(tmp_path / "artifacts" / name)
    done = complete(words, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = done.stdout.split()
    assert found[: len(expected)] == expected
    assert len(found) == len(expected) or words.endswith(" chat ")


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        ("normistral nonsense x", {}),
        ('normistral chat "', {}),
        ("normistral chat x", {"NORMISTRAL_HOME": "/dev/null/x"}),
        ("normistral chat x", {"NORMISTRAL_HOME": "~nobody-of-that-name"}),
        ("normistral chat x", {"_NORMISTRAL_COMPLETE": "complete_nonsense"}),
        ("normistral chat x", {"COMP_CWORD": "many"}),
    ],
)
def test_completion_never_prints_an_error(tmp_path, words, environment):
    done = complete(words, tmp_path, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rror" not in done.stdout


def test_completion_imports_nothing_heavy(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "normistral"],
        env=os.environ
        | {"_NORMISTRAL_COMPLETE": "complete_bash", "COMP_WORDS": "normistral chat ", "COMP_CWORD": "2"}
        | {"NORMISTRAL_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "demo" in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "openvino", "numpy", "rich", "prompt_toolkit", "transformers", "tokenizers"}
