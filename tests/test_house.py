"""The count of the package's files, circles and names, on a small package, and the targets that this one holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONTRACT = """
[[tool.importlinter.contracts]]
type = "layers"
layers = ["normistral.upper", "normistral.lower : normistral.other"]
"""


def count(root: Path) -> tuple[int, dict]:
    command = [sys.executable, ROOT / "scripts" / "house.py", root, "--json"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.returncode, json.loads(found.stdout)


@pytest.fixture
def package(tmp_path) -> Path:
    files = {
        "__init__.py": "from normistral.upper.face import Public\n",
        "upper/__init__.py": "",
        "upper/face.py": "from normistral.lower import small\nclass Public: ...\nclass _Own: ...\n",
        "lower/__init__.py": "",
        "lower/small.py": "class Public: ...\nclass _Own: ...\n",
        "lower/long.py": "'''Long.'''\n" * 501,
        "other.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "normistral" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "pyproject.toml").write_text(CONTRACT)
    return tmp_path


def test_sizes_and_names(package):
    code, rows = count(package)
    assert code == 0
    assert (rows["lines"], rows["files"], rows["longest file"]) == (507, 7, "501 normistral/lower/long.py")
    assert rows["files over 500 lines"] == ["normistral/lower/long.py (501)"]
    assert rows["class names twice"] == ["Public: normistral.lower.small, normistral.upper.face"]
    assert rows["files under 60 lines, one importer"] == [
        "normistral/lower/small.py (2) <- normistral.upper.face",
        "normistral/upper/face.py (3) <- normistral",
    ]
    assert rows["import circles"] == rows["upward imports"] == []


@pytest.mark.parametrize(
    ("text", "row", "place", "code"),
    [
        ("import normistral.upper.face", "import circles", "normistral.lower.small, normistral.upper.face", 1),
        (
            "def late():\n    from normistral.upper import face",
            "circles with lazy imports",
            "normistral.lower.small, normistral.upper.face",
            1,  # lazy or not, it goes upward
        ),
        ("HOME = 'normistral.upper.face'", "upward imports", "normistral.lower.small -> normistral.upper.face", 1),
        ("import normistral.lower.long", "upward imports", None, 0),
    ],
)
def test_circles_and_directions(package, text, row, place, code):
    (package / "normistral/lower/small.py").write_text(text)
    found, rows = count(package)
    assert rows[row] == ([place] if place else [])
    assert found == code


def test_an_import_that_import_linter_excepts_is_listed_apart(package):
    place = "normistral.lower.small -> normistral.upper.face"
    (package / "normistral/lower/small.py").write_text("def late():\n    import normistral.upper.face")
    with (package / "pyproject.toml").open("a") as file:
        file.write(f'ignore_imports = ["{place}"]\n')
    code, rows = count(package)
    assert (code, rows["upward imports"], rows["upward imports, excepted by name"]) == (0, [], [place])


def test_this_package():
    code, rows = count(ROOT)
    assert (code, rows["import circles"], rows["upward imports"]) == (0, [], [])
