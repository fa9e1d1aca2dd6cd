"""The code in docs/ runs as it stands, on a base model behind the scripted engine."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from drafting_models import draft_always
from scripted_cli import HELPERS, make_artifact
from scripted_models import make_base_model

from normistral.artifact.store import default_output
from normistral.export.recipe import Recipe

TRANSLATE = (HELPERS.parents[1] / "docs" / "translate.md").read_text(encoding="utf-8")
BOS = 1

# What a base model writes after the last colon: the translation, and then pairs of its own without end.
ANSWERS = {
    "Engelsk": " Good morning, “Åse”.\nBokmål: God natt.\nEngelsk: Good night.\n",
    "Bokmål": " God morgen, «Åse».\nEngelsk: Good night.\nBokmål: God natt.\n",
    "Nynorsk": " God morgon, «Åse».\n\nBokmål: God natt.\nNynorsk: God natt.\n",
}


def code_block(language: str) -> str:
    (code,) = re.findall(rf"```{language}\n(.*?)```", TRANSLATE, re.DOTALL)
    return code


def prompt_ids(model, text: str) -> list[int]:
    return [BOS, *model.tokenizer.encode(text, add_special_tokens=False)]


def record_sequences(model) -> list[list[int]]:
    """Every sequence that the engine was asked to continue, in order."""
    sequences = []
    next_logits = model._backend.next_logits

    def recorded(token_ids):
        sequences.append(list(token_ids))
        return next_logits(token_ids)

    model._backend.next_logits = recorded
    return sequences


@pytest.fixture
def base_model(tmp_path):
    """Makes a base model that gives this answer after every colon of a label."""

    def make(answer, after):
        model = draft_always(make_base_model(tmp_path, [answer], after=after), 0)  # none: what is fed is looked at
        return model, record_sequences(model)

    return make


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """The names of the document's Python example, and what it printed."""
    monkeypatch.setattr("normistral.load", lambda artifact: make_base_model(tmp_path, [" Svar.\nMer"], after=":"))
    names = {}
    exec(compile(code_block("python"), "docs/translate.md", "exec"), names)
    return names, capsys.readouterr().out


def test_the_example_prints_one_translation_a_line(example):
    _, printed = example
    assert printed == "Svar.\n\nSvar.\n" + "Svar.\n" * 2


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("Engelsk", "Bokmål"),
        ("Engelsk", "Nynorsk"),
        ("Bokmål", "Engelsk"),
        ("Nynorsk", "Engelsk"),
        ("Bokmål", "Nynorsk"),
        ("Nynorsk", "Bokmål"),
    ],
)
def test_the_prompt_is_the_model_cards_and_the_answer_ends_at_the_newline(base_model, example, source, target):
    translate = example[0]["translate"]
    model, sequences = base_model(ANSWERS[target], after=f"\n{target}:")
    text = ANSWERS[source].partition("\n")[0].strip()
    answer = ANSWERS[target].partition("\n")[0]
    assert translate(model, text, source, target) == answer.strip()
    prompt = f"{source}: {text}\n{target}:"
    assert prompt_ids(model, prompt) in sequences
    # The newline was the last token that was sampled, and it was not fed.
    assert sequences[-1] == prompt_ids(model, prompt + answer)


def test_english_to_bokmål_is_the_default(base_model, example):
    model, sequences = base_model(ANSWERS["Bokmål"], after="Bokmål:")
    assert example[0]["translate"](model, "Good morning.") == "God morgen, «Åse»."
    assert prompt_ids(model, "Engelsk: Good morning.\nBokmål:") in sequences


def test_examples_are_earlier_pairs_and_are_computed_once(base_model, example):
    model, sequences = base_model(ANSWERS["Nynorsk"], after="Nynorsk:")
    pairs = [("Jeg heter Kari.", "Eg heiter Kari."), ("Takk.", "Takk.")]
    assert example[0]["translate"](model, "God dag.\nGod natt.", "Bokmål", "Nynorsk", pairs) == (
        "God morgon, «Åse».\nGod morgon, «Åse»."
    )
    shots = "Bokmål: Jeg heter Kari.\nNynorsk: Eg heiter Kari.\n\nBokmål: Takk.\nNynorsk: Takk.\n\n"
    first, second = (prompt_ids(model, f"{shots}Bokmål: {text}\nNynorsk:") for text in ("God dag.", "God natt."))
    assert first in sequences
    assert second in sequences
    common = len(prompt_ids(model, f"{shots}Bokmål: God "))
    fed = len(first) + len(second) - common + 2 * len(" God morgon, «Åse».".encode())  # tokens are bytes
    assert sum(map(len, model._backend.forwarded)) == fed


def test_text_of_several_lines_keeps_its_lines(base_model, example):
    model, sequences = base_model(ANSWERS["Bokmål"], after="Bokmål:")
    translated = example[0]["translate"](model, "  One.\r\n\n \nTwo. \n")
    assert translated == "God morgen, «Åse».\n\n \nGod morgen, «Åse»."
    for line in ("One.", "Two."):
        assert prompt_ids(model, f"Engelsk: {line}\nBokmål:") in sequences


def test_an_answer_without_a_newline_ends_at_the_cap(base_model, example):
    (cap,) = re.findall(r"max_new_tokens=(\d+)", code_block("python"))
    model, _ = base_model("a" * 350, after="Bokmål:")
    assert example[0]["translate"](model, "x") == "a" * int(cap)


def test_the_shell_line_prints_the_translation_alone(tmp_path):
    (name,) = re.findall(r"normistral generate (\S+)", code_block("sh"))
    make_artifact(tmp_path / "artifacts" / name, role="base", template=None)
    settings = json.dumps({"folder": str(tmp_path), "answers": [ANSWERS["Bokmål"]], "after": "Good morning.\nBokmål:"})
    normistral = shlex.join([sys.executable, str(HELPERS / "scripted_cli.py"), settings])
    done = subprocess.run(
        ["sh", "-c", f'normistral() {{ {normistral} "$@"; }}\n{code_block("sh")}'],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        cwd=HELPERS,
        env=os.environ | {"NORMISTRAL_HOME": str(tmp_path)},
    )
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (0, " God morgen, «Åse».\n", "")


def test_its_artifact_is_the_one_that_its_export_makes():
    (preset,) = re.findall(r"`normistral export (\S+)`", TRANSLATE)
    name = default_output(preset, Recipe().weights, "openvino").name
    assert f'normistral.load("{name}")' in code_block("python")
    assert f"normistral generate {name} " in code_block("sh")
