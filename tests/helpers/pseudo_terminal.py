"""A command on a pseudo-terminal of any width."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time

from fork_server import start_forked
from scripted_cli import HELPERS

PATIENCE_S = 30
WIDE = 300  # columns: no line of a test's is broken


class Terminal:
    """A command on a pseudo-terminal, as somebody in front of it sees it.

    Args:
        arguments: words for the fork server.
        env: what differs from this process's environment.
        columns: width.
    """

    def __init__(self, arguments: list[str], env: dict[str, str], columns: int = WIDE) -> None:
        widths = {"COLUMNS", "LINES"}  # pytest-xdist sets them, and programs believe them more than the terminal
        kept = {name: value for name, value in os.environ.items() if name not in widths}
        self._leader, follower = pty.openpty()
        self.resize(columns)
        streams, environment = (follower, follower, follower), kept | {"TERM": "xterm"} | env
        self.process = start_forked(arguments, streams, cwd=HELPERS, env=environment, terminal=True)
        os.close(follower)
        self.raw = b""
        self._seen = 0

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._leader, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def expect(self, pattern: str) -> str:
        """Wait for `pattern` (a regular expression) after what was expected before; what came up to its end."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            new = self.text[self._seen :]
            if found := re.search(pattern, new):
                self._seen += found.end()
                return new[: found.end()]
            if time.monotonic() > deadline or not self._read():
                raise AssertionError(f"no {pattern!r} in {new!r}")

    def end(self) -> int:
        """Wait for the end of the process; its exit code."""
        while self._read():
            pass
        return self.process.wait(timeout=PATIENCE_S)

    @property
    def text(self) -> str:
        """Everything so far without escape sequences."""
        whole = self.raw.decode("utf-8", "ignore")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]", "", whole).replace("\r", "")

    def _read(self) -> bool:
        """Read what is there; False at the end."""
        ready, _, _ = select.select([self._leader], [], [], PATIENCE_S)
        try:
            block = os.read(self._leader, 65536) if ready else b""
        except OSError:  # Linux says EIO when the last process has gone
            block = b""
        self.raw += block
        if b"\x1b[6n" in block:  # where is the cursor? (a terminal answers that)
            os.write(self._leader, b"\x1b[1;1R")
        return bool(block)

    def hang_up(self) -> None:
        """Close the window."""
        os.close(self._leader)
        self._leader = -1

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._leader >= 0:
            os.close(self._leader)
