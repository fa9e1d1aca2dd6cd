"""Take the picture of a conversation for the READMEs: a real one, in tmux, drawn as SVG.

python scripts/picture_chat.py ARTIFACT docs/images/chat.svg
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH, HEIGHT = 88, 18
SAID = ("What is the capital of Norway?", "Is it a large city?", "/stats")


def tmux(*words: str) -> str:
    """What a tmux command prints."""
    return subprocess.run(["tmux", "-L", "normistral", *words], check=True, capture_output=True, text=True).stdout


def wait_for_prompt(seconds: float = 60) -> None:
    """Wait until the line under the prompt is there and the screen has not changed for a second."""
    before, deadline = "", time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(1)
        screen = tmux("capture-pane", "-p")
        if screen == before and " tokens left" in screen:
            return
        before = screen


def main() -> None:
    """Hold the conversation, and draw the screen."""
    artifact, output = sys.argv[1:]
    command = f"PS1= {Path(sys.executable).with_name('normistral')} chat {artifact} --no-history"
    tmux("new-session", "-d", "-x", str(WIDTH), "-y", str(HEIGHT), command)
    try:
        wait_for_prompt()
        for line in SAID:
            tmux("send-keys", "-l", line)
            tmux("send-keys", "Enter")
            wait_for_prompt()
        screen = tmux("capture-pane", "-p", "-e")
    finally:
        tmux("kill-server")
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen.rstrip()))
    picture = console.export_svg(title="normistral chat")
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # rich names fonts on a server
    Path(output).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
