"""Commands in processes forked from one that has imported the command line: 0.06 s of processor time in place of 0.5.

    done = run_forked([sys.executable, "-m", "normistral", "list"], stdin=b"...")

Words are those of `python -m normistral`, of `scripted_cli.command` or of `python -c CODE`. A child has its own
streams, directory, environment and exit, as a command that a shell starts. What depends on how the interpreter starts
(locale, encodings, imports) needs a process from `subprocess`. Where the system is not Linux, every command is one.

With `tools` the server is another one, which has imported the engines and the export's tools besides: seconds of each
process that uses them. What these read from the environment when they are imported is the server's: it reaches no hub.
"""

from __future__ import annotations

import array
import atexit
import fcntl
import gc
import importlib
import io
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

_LONGEST_REQUEST = 2**20
# What commands import when they run.
_IMPORTED = ("concurrent.futures", "jinja2.sandbox", "numpy.random", "tokenizers")
_IMPORTED += ("normistral.artifact.sandbox", "normistral.commands.chat", "normistral.commands.line_editor")
_IMPORTED += ("prompt_toolkit.shortcuts", "rich.console", "rich.progress", "typer.rich_utils")
_TOOLS = ("nncf", "onnxruntime", "openvino", "optimum.exporters.onnx.model_configs", "optimum.intel")
_TOOLS += ("optimum.onnxruntime", "torch", "normistral.evaluation.quality", "normistral.export.pipeline")


class Forked:
    """A child of the server; what of `subprocess.Popen` a test needs."""

    def __init__(self, arguments: Sequence[str], report: socket.socket) -> None:
        self.args = arguments
        self.returncode: int | None = None
        self._report = report
        self.pid = int(report.recv(64))

    def wait(self, timeout: float | None = None) -> int:
        """The exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        if self.returncode is None:
            self._report.settimeout(timeout)
            try:
                self.returncode = int(self._report.recv(64))
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._report.close()
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def start_forked(
    words: Sequence[str],
    streams: Sequence[int],
    *,
    cwd: Path,
    env: dict[str, str],
    terminal: bool = False,
    tools: bool = False,
) -> Forked | subprocess.Popen[bytes]:
    """Start a command.

    Args:
        streams: stdin, stdout and stderr; the caller closes its own.
        terminal: stdin becomes its controlling terminal, so that Ctrl-C is a signal.
        tools: fork from the process that has imported the engines and the export's tools.
    """
    if sys.platform != "linux":
        take = _take_terminal if terminal else None
        return subprocess.Popen(
            words, stdin=streams[0], stdout=streams[1], stderr=streams[2], cwd=cwd, env=env, preexec_fn=take
        )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = {"words": list(words[1:]), "cwd": str(cwd), "environment": env, "terminal": terminal}
    socket.send_fds(_server(tools), [json.dumps(request).encode()], [*streams, theirs.fileno()])
    theirs.close()
    return Forked(words, ours)


def run_forked(
    words: Sequence[str],
    *,
    cwd: Path,
    stdin: bytes = b"",
    env: dict[str, str] | None = None,
    text: bool = False,
    timeout: float = 60,
    tools: bool = False,
) -> subprocess.CompletedProcess:
    """`subprocess.run` with captured output, which `text` decodes.

    Raises:
        subprocess.TimeoutExpired: it was killed after `timeout` seconds.
    """
    (in_read, in_write), (out_read, out_write), (err_read, err_write) = os.pipe(), os.pipe(), os.pipe()
    streams = in_read, out_write, err_write
    process = start_forked(words, streams, cwd=cwd, env=dict(os.environ) if env is None else env, tools=tools)
    for theirs in streams:
        os.close(theirs)
    with ThreadPoolExecutor(3) as threads:
        threads.submit(_write, in_write, stdin)
        printed = [threads.submit(_read, end) for end in (out_read, err_read)]
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
    output = [one.result() for one in printed]
    return subprocess.CompletedProcess(words, status, *([one.decode() for one in output] if text else output))


@cache
def _server(tools: bool) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST_REQUEST)
    words = [sys.executable, __file__, str(theirs.fileno()), *(["tools"] if tools else [])]
    environment = os.environ | ({"HF_HUB_OFFLINE": "1"} if tools else {})
    server = subprocess.Popen(words, pass_fds=[theirs.fileno()], env=environment)
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


def serve(channel: socket.socket, tools: bool) -> None:
    """Of the server: a child for each request; its process id, and its exit status when it has ended."""
    for name in _IMPORTED:
        importlib.import_module(name)
    for name in _TOOLS if tools else ():
        with suppress(ImportError):  # the test that needs it says so
            importlib.import_module(name)
    import scripted_cli  # noqa: F401

    from normistral.cli import build_app

    build_app()  # imports every command
    gc.freeze()  # a child's collections leave alone what is imported
    waiting = selectors.DefaultSelector()
    waiting.register(channel, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is not channel:
                child, report = key.data
                report.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
                report.close()
                waiting.unregister(key.fileobj)
                os.close(key.fd)
                continue
            raw, ancillary, _, _ = channel.recvmsg(_LONGEST_REQUEST, socket.CMSG_SPACE(4 * 4))
            if not raw:
                return
            passed = array.array("i")
            passed.frombytes(ancillary[0][2])
            *streams, status = passed
            report = socket.socket(fileno=status)
            child = os.fork()
            if child == 0:
                for open_here in (waiting, channel, report):
                    open_here.close()
                request = json.loads(raw)
                _become(request, streams)
                sys.exit(_run(request["words"]))
            for stream in streams:
                os.close(stream)
            report.send(str(child).encode())
            waiting.register(os.pidfd_open(child), selectors.EVENT_READ, (child, report))


def _run(words: list[str]) -> int:
    import scripted_cli

    from normistral.cli import main

    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        return 0
    if words[0] == scripted_cli.__file__:
        return scripted_cli.run(scripted_cli.DEFAULTS | json.loads(words[1]), words[2:])
    assert words[:2] == ["-m", "normistral"], words
    sys.argv = ["normistral", *words[2:]]
    return main()


def _take_terminal() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _become(request: dict, streams: list[int]) -> None:
    """Take the place of a command that was started with these streams, in this directory and environment."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in set(streams):
        os.close(stream)
    if request["terminal"]:
        _take_terminal()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        binary = os.fdopen(number, "wb" if number else "rb", closefd=False)
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = io.TextIOWrapper(binary, "utf-8", errors, line_buffering=name == "stderr" or os.isatty(number))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve(socket.socket(fileno=int(sys.argv[1])), "tools" in sys.argv[2:])
