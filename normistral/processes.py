"""Command lines of child processes that run Python code with the import path of this one."""

from __future__ import annotations

import json
import sys


def python_command(code: str) -> list[str]:
    """Run `code` in this interpreter's program, with the `sys.path` of now; its own argv is empty."""
    start = f"import json, sys; sys.path[:] = json.loads(sys.argv.pop())\n{code}"
    return [sys.executable, "-c", start, json.dumps(sys.path)]


def main_command(module: str) -> list[str]:
    """Run the function `main` of a module; unlike `python -m`, nothing is imported before the path is set."""
    return python_command(f"from {module} import main; main()")
