"""Entry point of the command line: parses, runs a command of `normistral.commands`, and prints its errors.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from typing import Annotated, Any

import typer

import normistral
from normistral.commands import console
from normistral.commands.help import HelpCommand, HelpGroup, localise
from normistral.commands.options import DEFAULTS_NOTE, Debug, with_option_groups
from normistral.commands.translate import choose_language, translate
from normistral.errors import EngineError, NormistralError, UsageError
from normistral.files import explain

_INTERRUPTED, _BROKEN_PIPE = 130, 141  # 128 + the signal's number, as a shell reports it
_SIGNS_OF_NO_MEMORY = (  # in other packages' exceptions: of the loader, C++, and threads
    "failed to map segment",
    "annot allocate memory",
    "bad_alloc",
    "can't start new thread",
)
_COMPLETE = "_NORMISTRAL_COMPLETE"  # the variable through which typer's shell scripts ask
_logger = logging.getLogger("normistral")

_MODELS, _USE, _MEASURE, _MACHINE = "Models", "Use a model", "Measure and tune", "This machine, and others"
_CHAT_EXAMPLES = (
    'Examples: normistral chat demo; normistral chat demo --prompt "What is the capital of Norway?"; '
    "normistral chat demo < question.txt."
)
# Name -> panel of the help and further options for typer, in the order of the help. Each is a function of the same name
# (_ for -), or that of _FUNCTIONS, in the module of normistral.commands of the same name, or that of _MODULES.
_COMMANDS: dict[str, dict[str, Any]] = {
    "models": {"rich_help_panel": _MODELS},
    "export": {"rich_help_panel": _MODELS, "epilog": "Example: normistral export 7b-warm-instruct"},
    "list": {"rich_help_panel": _MODELS},
    "show": {"rich_help_panel": _MODELS},
    "rm": {"rich_help_panel": _MODELS},
    "info": {"rich_help_panel": _MODELS},
    "publish": {"rich_help_panel": _MODELS, "epilog": "Example: normistral publish norsk-int4 your-name/norsk-int4"},
    "chat": {"rich_help_panel": _USE, "epilog": f"{_CHAT_EXAMPLES}\n\n{DEFAULTS_NOTE}"},
    "generate": {"rich_help_panel": _USE, "epilog": DEFAULTS_NOTE},
    "batch": {"rich_help_panel": _USE, "epilog": DEFAULTS_NOTE},
    "serve": {"rich_help_panel": _USE, "epilog": "Example: normistral serve demo"},
    "bench": {"rich_help_panel": _MEASURE},
    "eval": {"rich_help_panel": _MEASURE},
    "tune": {"rich_help_panel": _MEASURE},
    "draft-table": {"hidden": True, "context_settings": {"ignore_unknown_options": True}},
    "doctor": {"rich_help_panel": _MACHINE},
    "build-kernel": {"rich_help_panel": _MACHINE},
    "bundle": {"rich_help_panel": _MACHINE},
}
_FUNCTIONS = {"list": "list_", "eval": "evaluate"}  # where Python has another meaning for the name
_MODULES = {"list": "models", "show": "models", "rm": "models", "generate": "chat", "draft-table": "chat"}
_MODULES |= {"build-kernel": "doctor", "bundle": "publish"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        exit code: 0 done, 1 it could not be done, 2 wrong usage, 130 interrupted, 141 nobody reads what it writes.
    """
    console.reopen_closed_streams()
    console.use_utf8()
    if arguments is None and _COMPLETE in os.environ:
        return _complete()
    _logger.setLevel(logging.WARNING)
    _logger.handlers[:] = [console.WarningLines()]
    try:
        choose_language()
        given = sys.argv[1:] if arguments is None else arguments
        _require_arguments(given)
        return _invoke(given)
    except NormistralError as error:
        limited = _memory_hint() if isinstance(error, EngineError) else None  # engines do not say that they got none
        console.print_error(error.message, limited or error.hint)
        return _end_in_error(error.exit_code)
    except typer.TyperException as error:  # the parser's own: unknown options, missing arguments
        console.print_error(_uncapitalised(error.format_message()), _usage_hint(error))
        return _end_in_error(error.exit_code)
    except KeyboardInterrupt:
        console.print_diagnostic("")
        return _INTERRUPTED
    except OSError as error:
        return _end_in_system_error(error)
    except MemoryError:
        console.print_error("the memory is used up", "close other programs, or take smaller weights (int4)")
        return _end_in_error(1)
    except Exception as error:
        if any(sign in str(error) for sign in _SIGNS_OF_NO_MEMORY):
            console.print_error("the memory is used up", _memory_hint() or "close other programs")
            return _end_in_error(1)
        console.print_error(
            f"this is a bug in normistral: {type(error).__name__}: {error}",
            "run it again with --debug, and report what that prints",
        )
        return _end_in_error(1)
    finally:
        console.drop_unwritable()


def _invoke(arguments: Sequence[str]) -> int:
    """Parse and call; errors are the caller's. (Typer's own `main` would print them in its way.)"""
    named = arguments[0] if arguments and arguments[0] in _COMMANDS else None
    command = localise(typer.main.get_command(build_app(named)))
    code = 0
    try:
        with command.make_context("normistral", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as exit_:
        code = exit_.exit_code
    except Exception as error:
        if _was_interrupted(error):
            raise KeyboardInterrupt from error
        raise
    sys.stdout.flush()  # here, where a closed pipe is still noticed
    return code


def _was_interrupted(error: BaseException) -> bool:
    """True for an error that Ctrl-C became: where it comes while C++ modules are imported, they raise ImportErrors."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__
    return cause is not None


def _memory_hint() -> str | None:
    """Hint on a memory limit of this process; None without one."""
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return None
    return f"this process may have {most / 1e6:,.0f} MB of memory at most (ulimit -v): raise that first"


def _require_arguments(arguments: Sequence[str]) -> None:
    """Refuse what no system can hand over, and a name of nothing: they come from a caller in Python."""
    for argument in arguments:
        try:
            fits = b"\0" not in os.fsencode(argument)
        except UnicodeError:
            fits = False
        if not fits:
            raise UsageError("an argument has a NUL in it, or is no text", "leave that out")


def _print_version(on: bool) -> None:
    if on:
        typer.echo(f"normistral {normistral.__version__}")
        raise typer.Exit


def _normistral(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    """NorMistral on ordinary processors: export a checkpoint to int4 or int8, OpenVINO or ONNX, and talk to it.

    An ARTIFACT is the folder of an exported model, its name in the local store, or OWNER/NAME of one that somebody
    published, which is downloaded once. Exit codes: 0 done, 1 it could not
    be done, 2 wrong usage.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def build_app(only: str | None = None) -> typer.Typer:
    """The command line.

    Args:
        only: the one command that is imported; None imports all of them.
    """
    app = typer.Typer(
        cls=HelpGroup,
        rich_markup_mode=None,  # `commands.help` chooses
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_normistral)
    for name, options in _COMMANDS.items() if only is None else [(only, _COMMANDS[only])]:
        plain = name.replace("-", "_")
        module = importlib.import_module(f"normistral.commands.{_MODULES.get(name, plain)}")
        command = getattr(module, _FUNCTIONS.get(name, plain))
        app.command(name, cls=HelpCommand, **options)(with_option_groups(command))
    return app


def _complete() -> int:
    """Answer the shell, which asks through the environment; nothing that goes wrong is shown."""
    with suppress(BaseException), redirect_stderr(io.StringIO()):
        localise(typer.main.get_command(build_app())).main([], prog_name="normistral", standalone_mode=False)
    return 0


def _uncapitalised(message: str) -> str:
    return (message[:1].lower() + message[1:]).rstrip(".")


def _usage_hint(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    command = "normistral" if context is None else context.command_path
    return f"see {command} --help"


def _end_in_error(code: int) -> int:
    if _logger.isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    return code


def _end_in_system_error(error: OSError) -> int:
    if error.errno == errno.EPIPE:
        console.drop_stdout()
        return _BROKEN_PIPE
    if error.errno == errno.EBADF and not console.is_writable(sys.stdout):
        console.drop_stdout()
        console.print_error(console.NO_STDOUT, console.STDOUT_HINT)
        return _end_in_error(1)
    where = f"{error.filename}: " if error.filename else ""
    reason, hint = explain(error)
    console.print_error(f"{where}{translate(reason)}", hint)
    return _end_in_error(1)


if __name__ == "__main__":
    sys.exit(main())
