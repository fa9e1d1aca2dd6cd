"""Layout of --help: commands and options in groups; framed and coloured on a wide terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup
from typer.models import TyperPath

from normistral.commands.console import is_terminal
from normistral.commands.translate import is_translated, translate, translate_paragraphs
from normistral.commands.wrapping import terminal_columns, wrap_text
from normistral.errors import UsageError

_DEFAULT = re.compile(r" (\(\*\)|Default:) [-\d.]+$")  # at the end of an option's help, after its own text
_LEAST_FRAMED = 100  # columns; in narrower frames options and choices would be broken in the midst of words
_GAP = 2
_LEAST_TEXT = 20  # cells beside the names; with fewer the text goes below them


def _fit(formatter: Any) -> None:
    """Give a plain formatter the terminal's real width: click's own has at least 50 columns."""
    if is_terminal(sys.stdout):
        formatter.width = max(_LEAST_TEXT, min(terminal_columns(sys.stdout), 80) - 1)


def localise(command: Any) -> Any:
    """A command of typer with help, groups and names of values in the user's language; and its commands."""
    if not is_translated():
        return command
    for item in (command, *command.params):
        for name in ("help", "epilog", "short_help"):
            if text := getattr(item, name, None):
                default = note[0] if (note := _DEFAULT.search(text)) else ""
                setattr(item, name, translate_paragraphs(text.removesuffix(default)) + translate(default))
        for name in ("metavar", "rich_help_panel", "options_metavar", "subcommand_metavar"):
            if text := getattr(item, name, None):
                setattr(item, name, translate(text))
    for one in getattr(command, "commands", {}).values():
        localise(one)
    return command


def _localise_frames() -> None:
    """The words of typer's frames."""
    from typer import rich_utils

    for name in ("DEFAULT_STRING", "REQUIRED_LONG_STRING", "ARGUMENTS_PANEL_TITLE", "OPTIONS_PANEL_TITLE"):
        setattr(rich_utils, name, translate(getattr(rich_utils, name)))


def _localise_extras(text: str) -> str:
    """The default and the like at the end of an option's help."""
    begin, bracket, extras = text.rpartition("[")
    if not bracket or not is_translated():
        return text
    return f"{begin}[{'; '.join(translate(extra) for extra in extras[:-1].split('; '))}]"


def _escape_markup(command: Any) -> None:
    """Keep brackets in texts, as in "normistral[export]", from being taken for rich's markup."""
    from rich.markup import escape

    for item in (command, *command.params, *getattr(command, "commands", {}).values()):
        for name in ("help", "epilog"):
            if text := getattr(item, name, None):
                setattr(item, name, escape(text))


def _write_rows(formatter: Any, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A group of names with their texts, these below where there is little room beside."""
    columns = formatter.width + 1
    with formatter.section(title):
        indent = " " * formatter.current_indent
        begin = len(indent) + max(len(name) for name, _ in rows) + _GAP
        beside = columns - begin >= _LEAST_TEXT
        further = " " * (begin if beside else len(indent) + _GAP)
        for name, text in rows:
            first = indent + name
            lines = wrap_text(further + text, columns, further)
            if beside:
                formatter.write(f"{first}{lines[len(first) :]}\n")
            else:  # an option's choices may be wider than a line
                formatter.write(f"{wrap_text(first, columns, further)}\n{lines}\n")


def _write_paragraphs(formatter: Any, text: str) -> None:
    indent = " " * (formatter.current_indent + _GAP)
    for paragraph in text.split("\n\n"):
        formatter.write_paragraph()
        formatter.write(wrap_text(indent + " ".join(paragraph.split()), formatter.width + 1, indent) + "\n")


def _grouped(items: Iterable[Any], default: str) -> dict[str, list[Any]]:
    """Items by their `rich_help_panel`, in their order."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(getattr(item, "rich_help_panel", None) or default, []).append(item)
    return groups


class _GroupedHelp:
    """Framed or plain help; text breaks between words, and not at hyphens as click's does."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """As a frame, or plain."""
        if is_terminal(sys.stdout) and terminal_columns(sys.stdout) >= _LEAST_FRAMED:
            command: Any = self
            command.rich_markup_mode = "rich"
            _escape_markup(command)
            if is_translated():
                _localise_frames()
        _fit(formatter)
        super().format_help(ctx, formatter)  # type: ignore[misc]  # typer's, in the classes below

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """The line that begins with "Usage"."""
        command: Any = self
        formatter.write_usage(ctx.command_path, " ".join(command.collect_usage_pieces(ctx)), translate("Usage: "))

    def get_help_option(self, ctx: Any) -> Any:
        """typer's own option, in the user's language."""
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None and option.help:
            option.help = translate(option.help)
        return option

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """The docstring."""
        _write_paragraphs(formatter, getattr(self, "help", None) or "")


class HelpCommand(_GroupedHelp, TyperCommand):
    """A command whose options are grouped, framed or plain."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """typer's, without two names that are none: Path("") would be this folder, and - a file of that name."""
        rest = super().parse_args(ctx, args)
        for one in self.params:
            value = ctx.params.get(one.name or "")
            if isinstance(one.type, TyperPath) and value in ("", "-"):
                name = one.opts[0] if one.param_type_name == "option" else one.make_metavar(ctx).strip("{}[]")
                raise UsageError(f"{name}: {value!r} names no file or folder", "name one")
        return rest

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Examples and notes."""
        if self.epilog:
            _write_paragraphs(formatter, self.epilog)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then options by group."""
        _write_parameters(self.get_params(ctx), ctx, formatter)


class HelpGroup(_GroupedHelp, TyperGroup):
    """The list of commands, grouped, framed or plain."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Options, then commands by group."""
        _write_parameters(self.get_params(ctx), ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Commands by group, each with its first line."""
        commands = [command for command in self.commands.values() if not command.hidden]
        for title, group in _grouped(commands, translate("Commands")).items():
            _write_rows(formatter, title, [(one.name or "", one.get_short_help_str(200)) for one in group])


def _write_parameters(parameters: Iterable[Any], ctx: Any, formatter: Any) -> None:
    described = [(one, record) for one in parameters if (record := one.get_help_record(ctx))]
    rows = {id(one): (names, _localise_extras(text)) for one, (names, text) in described}
    arguments = [rows[id(one)] for one, _ in described if one.param_type_name == "argument"]
    if arguments:
        _write_rows(formatter, translate("Arguments"), arguments)
    options = [one for one, _ in described if one.param_type_name == "option"]
    for title, group in _grouped(options, translate("Options")).items():
        _write_rows(formatter, title, [rows[id(one)] for one in group])
