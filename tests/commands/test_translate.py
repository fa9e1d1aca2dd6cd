"""The command line in Bokmål: when it is, what is translated, and that the catalogue fits the code."""

import gettext
import json
import os
import re
import sys
from pathlib import Path

import pytest
import typer.main
from fork_server import run_forked
from pseudo_terminal import WIDE, Terminal
from sample_artifacts import write_artifact
from scripted_cli import command

import normistral
from normistral.cli import build_app, main
from normistral.commands import translate as translating
from normistral.commands.help import localise
from normistral.commands.translate import Catalogue, choose_language, is_norwegian, translate
from normistral.errors import ModelNotFoundError, UsageError

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import catalogue

NORMISTRAL = [sys.executable, "-m", "normistral"]


@pytest.fixture
def nb(monkeypatch):
    monkeypatch.setenv("NORMISTRAL_LANG", "nb")
    choose_language()
    yield
    monkeypatch.setenv("NORMISTRAL_LANG", "en")
    choose_language()


def run(*arguments, home, **environment):
    environment = os.environ | {"NORMISTRAL_HOME": str(home), "NORMISTRAL_LANG": "nb"} | environment
    return run_forked([*NORMISTRAL, *arguments], cwd=home, env=environment, text=True)


# The catalogue


def test_the_catalogue_fits_the_code():
    """Lists every text that nb.po lacks, that is no longer in the code, or whose values were lost."""
    entries = catalogue.read_po(catalogue.CATALOGUE.read_text(encoding="utf-8"))
    assert catalogue.differences(entries) == [], "change normistral/commands/locale/nb.po"


def test_the_compiled_catalogue_is_that_of_the_text():
    compiled = catalogue.CATALOGUE.with_suffix(".mo").read_bytes()
    entries = catalogue.read_po(catalogue.CATALOGUE.read_text(encoding="utf-8"))
    assert compiled == catalogue.compile_mo(entries), "run: make docs"
    with catalogue.CATALOGUE.with_suffix(".mo").open("rb") as file:
        assert gettext.GNUTranslations(file).gettext("ready") == "klar"


def test_the_check_finds_what_it_is_for():
    entries = catalogue.read_po(catalogue.CATALOGUE.read_text(encoding="utf-8"))
    lost = next(msgid for msgid in entries if "{export_command}" in msgid)
    found = catalogue.differences(
        {msgid: text for msgid, text in entries.items() if msgid != "the message is empty"}
        | {"nobody says this": "ingen sier dette", lost: "uten verdi"}
    )
    assert [line.split(":")[0] for line in found] == [
        "lacks (runtime/chat.py)",
        "no longer in the code",
        "other values",
    ]


def test_all_of_the_help_is_translated(nb):
    group = typer.main.get_command(build_app())
    english = {
        id(item): getattr(item, "help", None) for one in [group, *group.commands.values()] for item in one.params
    }
    titles = {str(one.rich_help_panel) for one in group.commands.values() if not one.hidden}
    localise(group)
    kept = [
        item.help
        for one in [group, *group.commands.values()]
        for item in one.params
        if item.help and item.help == english[id(item)]
    ]
    assert kept == []
    assert not titles & {str(one.rich_help_panel) for one in group.commands.values() if not one.hidden}


# The language


@pytest.mark.parametrize(
    ("environment", "norwegian"),
    [
        ({}, False),
        ({"LANG": "nb_NO.UTF-8"}, True),
        ({"LANG": "nn_NO"}, True),
        ({"LANG": "no"}, True),
        ({"LANG": "en_GB.UTF-8"}, False),
        ({"LANG": "sv_SE.UTF-8"}, False),
        ({"LANG": "nb_NO.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, False),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "nb_NO.UTF-8"}, True),
        ({"LC_MESSAGES": "nb_NO.UTF-8", "LC_ALL": "C.UTF-8"}, False),
        ({"LANG": "nb_NO.UTF-8", "LC_ALL": ""}, True),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "nb:en"}, True),
        ({"LANG": "nb_NO.UTF-8", "LANGUAGE": "en"}, False),
        ({"LANG": "nb_NO.UTF-8", "LANGUAGE": "de:nn"}, True),
        ({"LANG": "C", "LANGUAGE": "nb"}, False),
        ({"LANG": "en_US.UTF-8", "NORMISTRAL_LANG": "nb"}, True),
        ({"LANG": "nb_NO.UTF-8", "NORMISTRAL_LANG": "en"}, False),
        ({"LANG": "nb_NO.UTF-8", "NORMISTRAL_LANG": ""}, True),
    ],
)
def test_which_language(environment, norwegian):
    assert is_norwegian(environment) is norwegian


def test_a_language_that_there_is_not(tmp_path):
    done = run("list", home=tmp_path, NORMISTRAL_LANG="klingonsk")
    assert done.returncode == 2
    assert done.stderr == (
        "error: NORMISTRAL_LANG names a language that there is not: 'klingonsk'\nhint: say nb or en\n"
    )
    with pytest.raises(UsageError):
        is_norwegian({"NORMISTRAL_LANG": "klingonsk"})


# What is translated


@pytest.mark.parametrize(
    ("english", "bokmaal"),
    [
        ("the message is empty", "meldingen er tom"),
        ("loading mitt ...", "laster mitt ..."),
        ("12,345 of 20,000 tokens left", "12\N{NO-BREAK SPACE}345 av 20\N{NO-BREAK SPACE}000 tokener igjen"),
        ("first token after 0.25 s", "første token etter 0,25 s"),
        ("there is no artifact 'x'; the local store has no artifacts",
         "det finnes ingen modell 'x'; det lokale lageret er tomt"),
        ("cannot read a.txt: permission denied", "kan ikke lese a.txt: ingen tilgang"),
        ("nobody translated this 1.5", "nobody translated this 1.5"),
        ("loading {a} ...", "laster {a} ..."),
        ("", ""),
    ],
)  # fmt: skip
def test_texts_with_values(nb, english, bokmaal):
    assert translate(english) == bokmaal


def test_names_and_paths_stay_as_they_are(nb):
    """Also those that are words of the catalogue."""
    assert translate("loading model ...") == "laster model ..."
    assert translate("memory is there already") == "memory finnes allerede"


def test_errors_stay_english_in_the_library_and_their_labels_everywhere(nb, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="there is no artifact 'mitt'"):
        normistral.load("mitt")
    assert main(["info", "mitt"]) == 1
    assert capsys.readouterr().err == (
        "error: det finnes ingen modell 'mitt'; det lokale lageret er tomt\n"
        "hint: lag en med: normistral export demo --recipe fast\n"
    )


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["chta"], r"kommandoen 'chta' finnes ikke\. Mente du 'chat'\?", "se normistral --help"),
        (["chat", "--promt", "x"], r"valget finnes ikke: --promt \(mulige valg: --prompt\)", "se normistral chat"),
        (["generate"], "argumentet 'MODELL' mangler", ""),
        (["chat", "--prompt"], "valget '--prompt' må ha en verdi", ""),
        (["chat", "--top-k", "x"], "ugyldig verdi for '--top-k': 'x' er ikke et heltall", ""),
        (["export", "demo", "--weights", "int3"], "ugyldig verdi for '--weights': 'int3' er ikke blant", ""),
        (["serve", "x", "--port", "-1"], "ugyldig verdi for '--port': -1 er utenfor området", ""),
        (["list", "x", "y"], r"det er gitt flere argumenter enn kommandoen tar: x y", ""),
        (["chat", "--top-p", "0", "--prompt", "x"], "top_p må være over 0", "temperature=0"),
        (["chat", "--temperature", "-1"], "temperature må være et tall fra 0 til 100, ikke -1.0", ""),
        (["chat", "--greedy", "--top-k", "3"], "med --greedy har --top-k ingen virkning", "utelat ett"),
        (["chat", "--prompt", " "], "ledeteksten er tom", "oppgi --prompt TEKST"),
        (["rm", "mitt"], "det finnes ingen modell 'mitt' i lageret; det lokale lageret er tomt", ""),
        (["show", "/etc/hosts"], "/etc/hosts er en fil; en modell er en mappe", "oppgi mappen"),
        (["chat", "mitt", "--json-schema", "/no"], "kan ikke lese --json-schema /no: filen eller", "oppgi en"),
    ],
)  # fmt: skip
def test_errors_of_a_first_day(tmp_path, arguments, error, hint):
    done = run(*arguments, home=tmp_path)
    assert done.returncode in (1, 2)
    assert re.match(rf"error: {error}", done.stderr), done.stderr
    assert hint in done.stderr.splitlines()[-1]


def test_json_is_the_same_in_every_language(tmp_path):
    write_artifact(tmp_path / "artifacts" / "mitt")
    for arguments in (["list", "--json"], ["info", "mitt", "--json"], ["models", "--json"]):
        assert run(*arguments, home=tmp_path).stdout == run(*arguments, home=tmp_path, NORMISTRAL_LANG="en").stdout
    document = json.loads(run("doctor", "--json", home=tmp_path).stdout)
    assert "cores" in document["threads_because"] or "core" in document["threads_because"]


def test_lists_and_the_doctor(tmp_path):
    write_artifact(tmp_path / "artifacts" / "mitt")
    assert run("list", home=tmp_path).stdout.split()[:2] == ["navn", "størrelse"]
    assert "leser høyst" in run("show", "mitt", home=tmp_path).stdout
    shown = run("doctor", home=tmp_path).stdout
    for word in (
        "Maskin",
        "prosessor",
        "ledig",
        "tråder: én per kjerne",
        "eksport er mulig",
        "Dette brukes på prosessoren",
    ):
        assert word in shown


@pytest.mark.parametrize("name", ["", "chat", "export"])
def test_no_word_of_the_help_is_broken(name):
    def shown(columns):
        environment = {"NO_COLOR": "1", "NORMISTRAL_LANG": "nb"}
        terminal = Terminal([*NORMISTRAL, *name.split(), "--help"], environment, columns)
        assert terminal.end() == 0
        terminal.close()
        return terminal.text

    def words(text):
        return set(re.sub("[│╭╮╰╯─]", " ", text).split())

    whole = words(shown(WIDE))
    for columns in (40, 80, 120):
        text = shown(columns)
        assert max(map(len, text.splitlines())) <= columns
        assert {word for word in words(text) - whole if not word.endswith(":")} <= {"/", "-h,"}, columns
    assert "Vis denne hjelpen og avslutt." in " ".join(shown(WIDE).split())


def test_a_conversation(tmp_path):
    write_artifact(tmp_path / "mitt")
    terminal = Terminal(
        command(tmp_path, "chat", str(tmp_path / "mitt"), answers=["Blåbær."]),
        {"NORMISTRAL_HOME": str(tmp_path / "home"), "NORMISTRAL_LANG": "nb"},
    )
    terminal.expect("/help viser kommandoene, Ctrl-D avslutter")
    terminal.type("Hva spiser du?\r")
    terminal.expect(r"tokener/s · første token etter \d+,\d\d s · \d+ av 400 tokener igjen av konteksten")
    terminal.type("/stats\r")
    terminal.expect(r"meldinger +2 i denne samtalen")
    terminal.type("/undi\r")
    terminal.expect("error: kommandoen /undi finnes ikke")
    terminal.expect("hint: mente du /undo\\? /help viser kommandoene")
    terminal.expect("\n>")
    terminal.type("\x04")
    assert terminal.end() == 0
    terminal.close()


def test_a_text_of_any_length_takes_little_time(nb):
    """Somebody's text goes through the patterns too: it is refused by length."""
    assert translate("there is no artifact " + "a" * 10_000_000) == "there is no artifact " + "a" * 10_000_000


def test_typers_own_places_for_values_are_no_patterns():
    with (translating._LOCALE / "nb.mo").open("rb") as file:
        found = Catalogue(gettext.GNUTranslations(file))
    assert found.translate("[default: 1]") == "[default: 1]"
    assert found.translate("[default: {}]") == "[standard: {}]"
