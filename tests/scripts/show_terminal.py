"""Captures of chat, /help, export and --help in tmux at 40, 80 and 120 columns; and no word in them is broken.

python tests/scripts/show_terminal.py ARTIFACT [FOLDER]      writes each capture to FOLDER/NAME-COLUMNS.txt
NORMISTRAL_LANG=nb python tests/scripts/show_terminal.py ...  in Bokmål

A word is broken if a narrow terminal shows one that a very wide one does not show. The question is short: a line that
somebody types is the line editor's, which breaks it anywhere.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from tiny_models import QUIRKS, make_mistral

WIDE, WIDTHS = 400, (40, 80, 120)
PATIENCE_S = 300
NORWEGIAN = os.environ.get("NORMISTRAL_LANG") == "nb"
# Of the end of what a command shows; and words that a row of progress may hold.
SPEED, SEARCHES, KNOWN, UNITS = (
    ("tokener/s", r"søker\s+i\s+dem", r"kjent\s+fra\s+før", {"lag", "byte", "igjen"})
    if NORWEGIAN
    else ("tokens/s", r"searches\s+them", r"known\s+from\s+before", {"layers", "bytes", "left"})
)
SERVER = ["tmux", "-L", "normistral-captures"]


class Window:
    """A command in a tmux window of its own."""

    def __init__(self, command: list[str], columns: int, folder: Path = Path()) -> None:
        self._name = f"capture{columns}"
        shell = f"cd {shlex.quote(str(folder))}; {shlex.join(command)}; echo DONE; exec sleep 600"
        self._tmux("new-session", "-d", "-s", self._name, "-x", str(columns), "-y", "120", shell)

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-t", self._name, "-l", text)
        self._tmux("send-keys", "-t", self._name, "Enter")

    def screen(self) -> str:
        return self._tmux("capture-pane", "-t", self._name, "-p").rstrip()

    def expect(self, pattern: str) -> list[str]:
        """Wait until the screen shows `pattern`; every different screen on the way."""
        deadline, seen = time.monotonic() + PATIENCE_S, []
        while time.monotonic() < deadline:
            screen = self.screen()
            if not seen or screen != seen[-1]:
                seen.append(screen)
            if re.search(pattern, screen):
                return seen
            time.sleep(0.1)
        raise SystemExit(f"no {pattern!r} in:\n{self.screen()}")

    def close(self) -> None:
        self._tmux("kill-session", "-t", self._name)

    def _tmux(self, *arguments: str) -> str:
        return subprocess.run([*SERVER, *arguments], check=True, capture_output=True, text=True).stdout


def capture(columns: int, artifact: str, checkpoint: Path, scratch: Path) -> dict[str, list[str]]:
    """Screens by name."""
    normistral = [sys.executable, "-m", "normistral"]
    chat = Window([*normistral, "chat", artifact, "--no-history", "--max-new-tokens", "80", "--draft", "off"], columns)
    chat.expect("(?m)^>")
    chat.type("Who were the Vikings?")
    answer = chat.expect(SPEED)[-1:]
    chat.type("/help")
    listed = chat.expect(SEARCHES)[-1:]
    chat.type("/stats")
    stats = chat.expect(f"{KNOWN}(?s:.*){KNOWN}")[-1:]
    chat.close()
    output = scratch / f"tiny-{columns}"
    export = Window(
        [*normistral, "export", str(checkpoint), output.name, "--recipe", "fast", "--group-size", "32"],
        columns,
        scratch,
    )
    exported = export.expect("(?m)^DONE")
    export.close()
    usage = Window([*normistral, "chat", "--help"], columns)
    shown = usage.expect("(?m)^DONE")[-1:]
    usage.close()
    return {"chat": answer, "help": listed, "stats": stats, "export": exported, "usage": shown}


def words(screens: list[str]) -> set[str]:
    """Words without figures, frames and the marks that move."""
    text = re.sub(r"[│╭╮╰╯─━⠀-⣿✓]", " ", "\n".join(screens))
    return {re.sub(r"[\d.,]*\d[\d.,]*", "0", word).strip(".,:") for word in text.split()}


def main(artifact: str, folder: str | None = None) -> int:
    broken = 0
    subprocess.run([*SERVER, "new-session", "-d", "-s", "keeper", "sleep 3600"], check=True)  # keeps the server alive
    with tempfile.TemporaryDirectory(dir=None if folder is None else folder) as scratch:
        checkpoint = make_mistral(Path(scratch) / "tiny", **QUIRKS)
        whole = capture(WIDE, artifact, checkpoint, Path(scratch))
        # A row of progress may pass between two looks at the wide terminal: units are known beforehand.
        known = {*UNITS, "kB", "MB", "s", "0/s"}.union(*(words(screens) for screens in whole.values()))
        for columns in WIDTHS:
            for name, screens in capture(columns, artifact, checkpoint, Path(scratch)).items():
                strange = {word for word in words(screens) - known if not set(word) <= set("0%:…/")}
                too_wide = max(map(len, screens[-1].splitlines())) > columns
                broken += bool(strange) or too_wide
                print(f"{name} at {columns} columns: {sorted(strange) if strange else 'no broken word'}")
                if folder is not None:
                    (Path(folder) / f"{name}-{columns}.txt").write_text("\n\n----\n\n".join(screens[-4:]) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    finally:
        subprocess.run([*SERVER, "kill-server"], capture_output=True)
