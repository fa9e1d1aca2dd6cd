"""The texts that calibration and the check at export use."""

import os
import re
import subprocess
import sys
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from normistral.export.texts import NAMES, load_texts

ROOT = Path(__file__).parents[2]
TEXTS = load_texts()
LANGUAGES = ("bokmaal", "nynorsk", "english")
# Words of one norm that the other does not have.
BOKMAAL = {"ikke", "jeg", "en", "et", "være", "hva", "hvordan", "fra", "mye", "noe", "de", "uke"}
NYNORSK = {"ikkje", "eg", "ein", "eit", "vere", "kva", "korleis", "frå", "mykje", "noko", "dei", "veker"}
SHARED = {"de"}  # nynorsk for "you" (plural)
RUN = 10  # words


def words(text):
    return re.findall(r"[^\W\d_]+", text.lower())


@pytest.mark.parametrize(("name", "least"), [("bokmaal", 4000), ("nynorsk", 2500), ("english", 1400), ("mixed", 300)])
def test_there_is_as_much_text_as_promised(name, least):
    assert least <= len(TEXTS[name].split()) <= 1.25 * least + 200


@pytest.mark.parametrize("name", NAMES)
def test_letters_are_composed_and_lines_are_short(name):
    text = TEXTS[name]
    assert unicodedata.is_normalized("NFC", text)
    assert "\r" not in text
    assert "\ufffd" not in text
    assert text.endswith("\n")
    assert max(map(len, text.splitlines())) <= 2000


def test_no_text_comes_twice():
    seen = Counter(
        tuple(run) for name in LANGUAGES for run in zip(*(words(TEXTS[name])[i:] for i in range(RUN)), strict=False)
    )
    assert len(seen) > 8000
    assert [run for run, count in seen.items() if count > 1] == []


# Of all letters. Norwegian prose has about 1.5 % å, 0.9 % ø and 0.2 % æ; Nynorsk has fewer æ (ver-, vere).
@pytest.mark.parametrize("name", ["bokmaal", "nynorsk"])
@pytest.mark.parametrize(("letter", "low", "high"), [("å", 0.010, 0.025), ("ø", 0.005, 0.016), ("æ", 0.0003, 0.004)])
def test_norwegian_letters_are_as_frequent_as_in_norwegian(name, letter, low, high):
    letters = [char for char in TEXTS[name].lower() if char.isalpha()]
    assert low < letters.count(letter) / len(letters) < high


def test_each_text_keeps_to_its_norm():
    bokmaal, nynorsk, english = (set(words(TEXTS[name])) for name in LANGUAGES)
    assert bokmaal >= BOKMAAL
    assert nynorsk >= NYNORSK
    assert bokmaal & NYNORSK == set()
    assert nynorsk & (BOKMAAL - SHARED) == set()
    assert english & {"ikke", "ikkje", "jeg", "eg", "og", "av", "på"} == set()


def test_the_mixed_text_has_what_tokenizers_stumble_over():
    mixed = TEXTS["mixed"]
    for piece in (
        "def ",
        "SELECT ",
        '{\n  "',
        "\t",
        "   ",
        "\n\n\n",
        "\u00a0",
        "  \n",
        "«",
        "»",
        "👩‍🔬",
        "👍🏽",
        "²",
        "%C3",
    ):
        assert piece in mixed, piece
    assert set("čđŋšŧžáïö") <= set(mixed)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_we_evaluate_with_is_in_it(name):
    """Evaluation uses Debian's Norwegian documentation."""
    assert not {"debian", "linux", "ubuntu", "gimp", "skolelinux", "gnu"} & set(words(TEXTS[name]))


def test_an_installed_package_has_them(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "normistral", "scripts"):
        (source / name).symlink_to(ROOT / name)  # a build writes beside its sources
    environment = os.environ | {"NORMISTRAL_KERNELS": "none"}
    subprocess.run([*command, "--wheel-dir", tmp_path, source], check=True, timeout=300, env=environment)
    (wheel,) = tmp_path.glob("normistral-*.whl")
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = f"import sys; sys.path.insert(0, {str(unpacked)!r})\n" + (
        "from normistral.export import texts\n"
        "print(texts.__file__)\n"
        "print({name: len(text) for name, text in texts.load_texts().items()})\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path
    )
    where, lengths = done.stdout.splitlines()
    assert Path(where).is_relative_to(unpacked)
    assert lengths == str({name: len(text) for name, text in TEXTS.items()})
