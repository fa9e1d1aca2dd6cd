"""`subprocess.run` for the scripted command line, forked from a process that has imported it: 0.06 s in place of 0.4.

    done = run_forked(script, ["chat", ...], stdin=b"...")

A child has its own streams, directory, environment and exit, as a command that a shell starts. What depends on how the
interpreter starts (locale, encodings, imports) needs a process from `subprocess`.
"""

from __future__ import annotations

import array
import atexit
import gc
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

_LONGEST_REQUEST = 2**20
# What commands import when they run.
_IMPORTED = ("concurrent.futures", "jinja2.sandbox", "numpy.random", "tokenizers")
_IMPORTED += ("normistral.artifact.sandbox", "normistral.commands.chat")


def run_forked(
    script: dict, arguments: list[str], *, stdin: bytes | None, cwd: Path, timeout: float = 60
) -> subprocess.CompletedProcess[bytes]:
    """Run `scripted_cli.run(script, arguments)` in a child of the server.

    Raises:
        subprocess.TimeoutExpired: it was killed after `timeout` seconds.
    """
    channel = _server()
    request = {"script": script, "arguments": arguments, "cwd": str(cwd), "environment": dict(os.environ)}
    (in_read, in_write), (out_read, out_write), (err_read, err_write) = os.pipe(), os.pipe(), os.pipe()
    socket.send_fds(channel, [json.dumps(request).encode()], [in_read, out_write, err_write])
    for theirs in (in_read, out_write, err_write):
        os.close(theirs)
    child = int(channel.recv(64))
    with ThreadPoolExecutor(3) as threads:
        threads.submit(_write, in_write, stdin or b"")
        printed = [threads.submit(_read, end) for end in (out_read, err_read)]
        channel.settimeout(timeout)
        try:
            status = int(channel.recv(64))
        except TimeoutError:
            os.kill(child, signal.SIGKILL)
            channel.settimeout(None)
            channel.recv(64)
            raise subprocess.TimeoutExpired(arguments, timeout) from None
    return subprocess.CompletedProcess(arguments, status, *(one.result() for one in printed))


@cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST_REQUEST)
    server = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(server.wait)
    atexit.register(ours.close)
    return ours


def _write(end: int, data: bytes) -> None:
    with os.fdopen(end, "wb") as file:
        try:
            file.write(data)
            file.flush()
        except BrokenPipeError:  # it did not read all of it
            return


def _read(end: int) -> bytes:
    with os.fdopen(end, "rb") as file:
        return file.read()


def serve(channel: socket.socket) -> None:
    """Of the server: a child for each request; its process id, and its exit status when it has ended."""
    import scripted_cli

    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # a child's collections leave alone what is imported
    while True:
        raw, ancillary, _, _ = channel.recvmsg(_LONGEST_REQUEST, socket.CMSG_SPACE(3 * 4))
        if not raw:
            return
        streams = array.array("i")
        streams.frombytes(ancillary[0][2])
        request = json.loads(raw)
        child = os.fork()
        if child == 0:
            channel.close()
            _become(request, list(streams))
            sys.exit(scripted_cli.run(request["script"], request["arguments"]))
        for stream in streams:
            os.close(stream)
        channel.send(str(child).encode())
        channel.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


def _become(request: dict, streams: list[int]) -> None:
    """Take the place of a command that was started with these streams, in this directory and environment."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        binary = os.fdopen(number, "wb" if number else "rb", closefd=False)
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = io.TextIOWrapper(binary, "utf-8", errors, line_buffering=name == "stderr")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve(socket.socket(fileno=int(sys.argv[1])))
