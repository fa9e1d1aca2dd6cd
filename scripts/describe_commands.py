"""Write docs/commands.md from the command line's own help: every command with its arguments and options.

python scripts/describe_commands.py > docs/commands.md        make docs
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer.main

from normistral.cli import build_app

HEAD = """# Commands

Made from the command line's own help by `make docs`. Exit codes: 0 done, 1 it could not be done, 2 wrong usage. Errors
are an `error:` and a `hint:` line on stderr. `normistral --debug COMMAND` shows what is logged, and tracebacks.
"""


def describe() -> str:
    """The whole document."""
    group: Any = typer.main.get_command(build_app())
    outer = group.make_context("normistral", [], resilient_parsing=True)
    sections = [HEAD]
    for name in group.list_commands(outer):
        command = group.get_command(outer, name)
        if not command.hidden:
            context = command.make_context(name, [], parent=outer, resilient_parsing=True)
            sections.append("\n".join(_describe_command(command, context)))
    return "\n".join(sections)


def _describe_command(command: Any, context: Any) -> Iterator[str]:
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"## {context.info_name}\n\n```text\nnormistral {context.info_name} {usage}\n```\n"
    yield _one_line(command.help or "") + "\n"
    rows = [record for parameter in command.get_params(context) if (record := _record(parameter, context))]
    if rows:
        yield "| option | |\n|---|---|"
        yield from (f"| `{_cell(names)}` | {_cell(text)} |" for names, text in rows)
        yield ""


def _record(parameter: Any, context: Any) -> tuple[str, str] | None:
    if "--help" in parameter.opts:
        return None
    found: tuple[str, str] | None = parameter.get_help_record(context)
    return found


def _one_line(text: str) -> str:
    return " ".join(text.replace("\b", "").split())


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    print(describe(), end="")
