"""The Bokmål catalogue of the command line: compare it with the code, and compile it.

python scripts/catalogue.py             write nb.mo from nb.po (`make docs` does)
python scripts/catalogue.py --check     list texts that nb.po lacks, and those that no longer stand in the code

Texts stand in the code in English, with values in f-strings. Their msgids are templates: {name} for each expression,
named after its last word, and {name:n} where it is formatted as a number. A docstring has one msgid a paragraph.
"""

from __future__ import annotations

import ast
import json
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "normistral"
CATALOGUE = PACKAGE / "commands" / "locale" / "nb.po"

# Everything that these files show, and the errors that they raise, has to be translated.
COMPLETE = (
    *("cli.py", "text_input.py", "artifact/store.py", "runtime/chat.py", "runtime/options.py", "runtime/overflow.py"),
    *(f"commands/{name}.py" for name in ("answer", "batch", "chat", "console", "doctor")),
    *(f"commands/{name}.py" for name in ("export", "find_artifact", "line_editor", "models", "options", "progress")),
    *(f"commands/{name}.py" for name in ("publish", "repl", "result_files", "saved_chats", "serve", "translate")),
    *(f"artifact/{name}.py" for name in ("download", "hub", "origin")),
    *("export/pipeline.py", "export/publish.py"),
    "export/quantize/kept_layers.py",
)
HELP = tuple(f"commands/{name}.py" for name in ("bench", "eval", "info", "tune"))  # their help, without their tables
_SHOWN = {"translate", "say", "warn", "confirm", "print_error", "stage", "note"}  # their texts may be single words
_SHOWN_KEYWORDS = {"help", "rich_help_panel", "epilog", "metavar"}
_NUMBERS = {"format_bytes", "_gib"}  # functions whose result is a number with its unit
_NUMBER_SPEC = re.compile(r"[+]?,?(\.\d+)?[fg%]?|,?d?|\.\d+g")
# For programs, or searched for in other packages' texts.
_NOT_SHOWN = re.compile(
    r"Extension:|-1 is as many|Default: the model's|The same text again|.* %[ds]|.*(map|locate) |can't start"
)
_WORDS = re.compile(r"[A-Za-z]{2,}[,:;.)]* [(/]*[A-Za-z]{2,}")
# Texts of typer and its parser, which commands.help and cli print.
# And reasons of the operating system.
FOREIGN = (
    *("Usage:", "Arguments", "Options", "Commands", "[default: {}]", "[required]", "default: {default}", "required"),
    *("Show this message and exit.", "Install completion for the current shell.", "[OPTIONS]", "COMMAND [ARGS]..."),
    "Show completion for the current shell, to copy it or customize the installation.",
    *("no such option: {name}", "missing argument {name}", "missing option {name}", "no such command {name}"),
    *("no such option: {name} (Possible options: {others})", "no such command {name}. Did you mean {other}?"),
    *("invalid value for {name}: {why}", "option {name} requires an argument", "option {name} does not take a value"),
    *("got unexpected extra argument(s) ({names})", "{value} is not a valid int", "{value} is not a valid float"),
    *("{value} is not one of {others}", "{value} is not in the range {range}"),
    *("No such file or directory", "Is a directory", "Not a directory", "Address already in use", "Connection refused"),
    "Cannot assign requested address",
)


def template_of(node: ast.AST) -> str | None:
    """msgid of a text in the code; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("{", "{{").replace("}", "}}") if "{" in node.value else node.value
    if not isinstance(node, ast.JoinedStr):
        return None
    pieces, names = [], []
    for value in node.values:
        if isinstance(value, ast.Constant):
            pieces.append(str(value.value).replace("{", "{{").replace("}", "}}"))
            continue
        assert isinstance(value, ast.FormattedValue)
        expression = ast.unparse(value.value)
        if not isinstance(value.value, ast.Subscript):
            expression = re.sub(r"'[^']*'|\"[^\"]*\"", "", expression)
        name = (re.findall(r"[A-Za-z]\w*", expression) or ["value"])[-1].strip("_")
        names.append(name)
        called = value.value.func if isinstance(value.value, ast.Call) else None
        spec = "" if value.format_spec is None else ast.unparse(value.format_spec)[2:-1]
        is_number = (spec and _NUMBER_SPEC.fullmatch(spec)) or getattr(called, "id", "") in _NUMBERS
        count = names.count(name)
        pieces.append(f"{{{name}{count if count > 1 else ''}{':n' if is_number else ''}}}")
    text = "".join(pieces)
    return text.replace("{{", "{").replace("}}", "}") if not names else text


def paragraphs(docstring: str) -> list[str]:
    """msgids of a docstring."""
    return [" ".join(paragraph.split()) for paragraph in docstring.split("\n\n")]


def all_texts() -> set[str]:
    """Every text of the package that could be a msgid, and those of typer."""
    found = set(FOREIGN)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (text := template_of(node)) is not None:
                found |= {text, text.strip(), *paragraphs(text)}
    return found


def required_texts() -> dict[str, str]:
    """msgids that the catalogue has to have -> the file that they are from."""
    found = dict.fromkeys(FOREIGN, "typer")
    for name in (*COMPLETE, *HELP):
        path = PACKAGE / name
        if path.exists():
            for text in _shown_texts(ast.parse(path.read_text(encoding="utf-8")), path):
                found.setdefault(text.strip(), name)
    return {text: where for text, where in found.items() if re.search(r"[A-Za-z]{2}", re.sub(r"\{[^}]*\}", "", text))}


def _shown_texts(tree: ast.AST, path: Path) -> Iterator[str]:
    """Texts of several words, and single ones in places where they are shown; docstrings of commands."""
    whole = path.relative_to(PACKAGE).as_posix() not in HELP
    for node in _walk(tree):
        if (text := template_of(node)) is not None:
            if whole and _WORDS.search(re.sub(r"\{[^}]*\}", "x", text)) and not _NOT_SHOWN.match(text):
                yield text
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            shown = [keyword.value for keyword in node.keywords if keyword.arg in _SHOWN_KEYWORDS]
            shown += node.args[:2] if whole and (name in _SHOWN or name.endswith("Error")) else []
            yield from (text for one in shown for part in _parts(one) if (text := template_of(part)) is not None)
        elif isinstance(node, ast.FunctionDef) and node.name in _command_names(path):
            yield from paragraphs(ast.get_docstring(node) or "")


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Without the insides of f-strings, and without docstrings."""
    yield node
    if not isinstance(node, ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
                yield from _walk(child)


def _parts(node: ast.AST) -> list[ast.AST]:
    return [node.body, node.orelse] if isinstance(node, ast.IfExp) else [node]


def _command_names(path: Path) -> tuple[str, ...]:
    """Names of a command's function."""
    if path.name == "cli.py":
        return ("_normistral",)
    stem = path.stem.replace("eval", "evaluate")
    return (stem, f"{stem}_") if path.parent.name == "commands" and stem not in ("options", "translate") else ()


def read_po(text: str) -> dict[str, str]:
    """msgid -> msgstr of a .po file without contexts and plurals."""
    entries: dict[str, str] = {}
    msgid, target, parts = "", "", {"msgid": "", "msgstr": ""}
    for line in [*text.splitlines(), 'msgid ""']:
        keyword, _, quoted = line.partition('"')
        if keyword.strip() == "msgid":
            if target == "msgstr":
                msgid = parts["msgid"]
                if msgid in entries:
                    raise SystemExit(f"twice in the catalogue: {msgid!r}")
                entries[msgid] = parts["msgstr"]
            parts = {"msgid": "", "msgstr": ""}
        if line.startswith(("msgid", "msgstr", '"')):
            target = keyword.strip() or target
            parts[target] += json.loads('"' + quoted)
    return entries


def compile_mo(entries: dict[str, str]) -> bytes:
    """The same as a .mo file (GNU gettext manual, "The Format of GNU MO Files"), sorted, without a hash table."""
    pairs = [(msgid.encode(), msgstr.encode()) for msgid, msgstr in sorted(entries.items()) if msgstr]
    header, row = 28, 8
    offset = header + 2 * row * len(pairs)
    tables: list[bytes] = []
    strings = b""
    for column in (0, 1):
        for pair in pairs:
            tables.append(struct.pack("<2I", len(pair[column]), offset + len(strings)))
            strings += pair[column] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), header, header + row * len(pairs), 0, 0)
    return head + b"".join(tables) + strings


def differences(entries: dict[str, str]) -> list[str]:
    """Lines on texts that the catalogue lacks, has without need, or translates with other values."""
    there, lines = all_texts(), []
    lines += [f"lacks ({where}): {text}" for text, where in required_texts().items() if not entries.get(text)]
    lines += [f"no longer in the code: {text}" for text in entries if text and text not in there]
    lines += [f"values beside each other, which cannot be told apart: {text}" for text in entries if "}{" in text]
    for msgid, msgstr in entries.items():
        if msgid and _values(msgid) != _values(msgstr):
            lines.append(f"other values: {msgid}")
    return lines


def _values(text: str) -> list[tuple[str, str | None]]:
    return sorted((name, spec) for _, name, spec, _ in Formatter().parse(text) if name is not None)


def main(arguments: list[str]) -> int:
    """Entry point."""
    entries = read_po(CATALOGUE.read_text(encoding="utf-8"))
    if arguments == ["--check"]:
        lines = differences(entries)
        print("\n".join(lines) or f"{len(entries) - 1} texts, none lacks")
        return bool(lines)
    CATALOGUE.with_suffix(".mo").write_bytes(compile_mo(entries))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
