"""Child processes: command lines with the import path of this one, names of the signals that ended them."""

from __future__ import annotations

import json
import signal
import sys


def python_command(code: str) -> list[str]:
    """Run `code` in this interpreter's program, with the `sys.path` of now; its own argv is empty."""
    start = f"import json, sys; sys.path[:] = json.loads(sys.argv.pop())\n{code}"
    return [sys.executable, "-c", start, json.dumps(sys.path)]


def main_command(module: str) -> list[str]:
    """Run the function `main` of a module; unlike `python -m`, nothing is imported before the path is set."""
    return python_command(f"from {module} import main; main()")


def signal_name(number: int) -> str:
    """Such as SIGSEGV; "signal N" for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
