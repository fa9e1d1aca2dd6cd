"""What the documents tell a reader to type exists: commands, options, make targets, extras, links; docs/commands.md."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main

from normistral.cli import build_app

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"], key=lambda path: str(path)
)
SHOWN = re.compile(r"^ *```(?:sh|console)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(normistral [a-z-]+[^`\n]*)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def document(request):
    return request.param


@pytest.fixture(scope="module")
def commands():
    """Options of every command, by its name."""
    group = typer.main.get_command(build_app())
    outer = group.make_context("normistral", [], resilient_parsing=True)
    options = {}
    for name in group.list_commands(outer):
        command = group.get_command(outer, name)
        context = command.make_context(name, [], parent=outer, resilient_parsing=True)
        options[name] = {option for one in command.get_params(context) for option in (*one.opts, *one.secondary_opts)}
    return options


def typed_commands(text):
    """Every `normistral …` that a document shows, split as a shell does it."""
    shown = [line for block in SHOWN.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*shown, *INLINE.findall(text)]:
        line = re.sub(r"\s{2,}[^\"']*$", "", line.strip().removeprefix("$ "))  # what a column beside it says
        if re.match(r"normistral [a-z]", line):
            yield shlex.split(re.split(r" [|>&] ", line)[0].replace("…", ""), comments=True)


def test_commands_and_their_options_exist(document, commands):
    if document.name == "CHANGELOG.md":
        pytest.skip("speaks of what is gone, too")
    for _, name, *arguments in typed_commands(document.read_text(encoding="utf-8")):
        assert name in commands, name
        named = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
        assert named <= commands[name], f"{name}: {named - commands[name]}"


def test_links_lead_to_files(document):
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if not re.match(r"https?:|mailto:", target):
            assert (document.parent / target).exists(), target


def test_make_targets_and_extras_exist(document):
    text = document.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for named in re.findall(r"pip install [^`\n]*?(?:normistral|\.|\.whl)\[([a-z,-]+)\]", text):
        assert set(named.split(",")) <= extras.keys(), named


def test_the_commands_are_described_as_their_help_does():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "describe_commands.py"], capture_output=True, check=True, timeout=60
    )
    described = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert described == done.stdout.decode("utf-8"), "run: make docs"


def test_files_and_modules_that_a_document_names_exist(document):
    """Paths below the package in backticks or tables, and dotted names that a reader may import."""
    if document.name == "CHANGELOG.md":
        pytest.skip("speaks of what is gone, too")
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"`((?:normistral|scripts|benchmarks|examples|docs)/[\w./-]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
    inner = re.findall(rf"`((?:{'|'.join(rooms())})/(?:[\w/]+/)?(?:\w+\.py)?)`", text)
    assert [path for path in inner if not (ROOT / "normistral" / path).exists()] == []
    assert [name for name in re.findall(r"\bnormistral(?:\.\w+)+", text) if not exists(name)] == []


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {re.match(r"[\w-]+", one)[0] for one in wanted} - {"normistral", "onnxruntime", "onnxruntime-gpu"}
    reasons = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    assert [name for name in sorted(names) if f"`{name}`" not in reasons] == []


def test_every_file_that_the_architecture_names_exists():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "normistral").rglob("*.py")}
    named = set(re.findall(r"(?<![\w./])(?:\w+/)*\w+\.py\b", text))
    assert len(named) > 20
    assert [one for one in named if not any(f"/{file}".endswith(f"/{one}") for file in files)] == []
    # Which rooms there are: a new one has to be described.
    assert [room for room in rooms() if f"normistral/{room}/__init__.py)" not in text] == []


def test_names_of_the_architecture_are_in_the_files_beside_them():
    for row in re.findall(r"^\|.*", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE):
        linked = re.findall(r"\]\(\.\./(normistral/[\w/]+\.py)\)", row)
        code = "".join((ROOT / path).read_text(encoding="utf-8") for path in linked)
        assert not linked or [name for name in re.findall(r"`(\w+)`", row) if name not in code] == [], row


def rooms():
    """Folders of the package but for `serving`, an earlier name."""
    folders = (path.parent.name for path in (ROOT / "normistral").glob("*/__init__.py"))
    return [name for name in folders if name != "serving"]


def exists(dotted):
    """Whether this is a module of the package, or a name at the top of one; nothing heavy is imported."""
    parts = dotted.split(".")
    if parts[1] in ("json", "service"):  # files
        return True
    for count in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:count])
        source = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)
        if source is not None:
            rest = parts[count:]
            return not rest or re.search(rf"\b{rest[0]}\b", source.read_text(encoding="utf-8")) is not None
    return False
