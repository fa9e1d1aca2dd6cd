"""A server that speaks the chat API by script, and serves the page as the real one does.

with StubServer([Answer(["Oslo", "."]), Refuse(429)]) as server: ...    # one entry for each chat request, in order
"""

from __future__ import annotations

import json
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET
from typing import Any, Self

from normistral.server.public_routes import load_page

WAIT_S = 20  # for what a test forgot to open


@dataclass
class Answer:
    """Streams texts.

    Attributes:
        texts: pieces of the answer; an Event among them is waited for.
        reasoning: as `texts`, of what comes before the answer.
        ending: "whole"; "reset" resets the connection after the last piece; "silent" closes it in good order without an
            end of the answer; "error" sends an error instead of the end.
        gone: set when the client was found to have left.
    """

    texts: Sequence[str | threading.Event]
    reasoning: Sequence[str | threading.Event] = ()
    finish: str = "stop"
    total_tokens: int = 20
    left_out: int = 0  # tokens
    ending: str = "whole"
    gone: threading.Event = field(default_factory=threading.Event)

    def reply(self, handler: Handler) -> None:
        handler.begin(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
        try:
            self._send_pieces(handler)
        except OSError:
            self.gone.set()

    def _send_pieces(self, handler: Handler) -> None:
        handler.chunk(b": a comment keeps the connection open\n\n")
        for name, pieces in (("reasoning_content", self.reasoning), ("content", self.texts)):
            for piece in pieces:
                if isinstance(piece, threading.Event):
                    self._wait(handler, piece)
                else:
                    handler.event({"choices": [{"index": 0, "delta": {name: piece}, "finish_reason": None}]})
        if self.ending == "reset":
            handler.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
            return
        if self.ending == "error":
            handler.event({"error": {"message": "the engine failed", "type": "server_error", "code": None}})
        elif self.ending == "whole":
            handler.event({"choices": [{"index": 0, "delta": {}, "finish_reason": self.finish}]})
            left_out = {"left_out": {"tokens": self.left_out}} if self.left_out else {}
            handler.event({"choices": [], "usage": {"total_tokens": self.total_tokens, **left_out}})
            handler.chunk(b"data: [DONE]\n\n")
        handler.chunk(b"")

    def _wait(self, handler: Handler, event: threading.Event) -> None:
        for _ in range(WAIT_S * 20):
            if event.wait(0.05):
                return
            handler.chunk(b": still here\n\n")  # finds out whether the client is


@dataclass
class Refuse:
    """Answers with OpenAI's error shape."""

    status: int
    message: str = "not now"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def reply(self, handler: Handler) -> None:
        handler.json(self.status, {"error": {"message": self.message, "type": "x", "code": self.code}}, self.headers)


def describe(name: str, context_length: int) -> dict[str, Any]:
    """A model as the server tells of it."""
    role = "base" if name.endswith("-base") else "chat"
    return {"id": name, "object": "model", "context_length": context_length, "max_new_tokens": 300, "role": role}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubServer

    def do_GET(self) -> None:
        if self.path == "/":
            page = load_page()
            self.begin(200, {**page.headers, "content-length": str(len(page.body))})
            self.wfile.write(page.body)
        elif self.path == "/v1/models":
            if not self.server.listable.wait(WAIT_S) or self.server.key_is_missing(self):
                return
            self.json(
                200,
                {"object": "list", "data": [describe(name, self.server.context_length) for name in self.server.models]},
            )
        else:
            self.json(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.server.key_is_missing(self):
            self.server.asked.append(body)
            self.server.script.popleft().reply(self)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.begin(status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def event(self, content: Any) -> None:
        self.chunk(f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode())

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Nothing: pytest shows what matters."""


class StubServer(ThreadingHTTPServer):
    """Attributes: `script`, what is still to be answered; `asked`, the bodies of chat requests so far; `listable`: the
    list of models waits for it.
    """

    daemon_threads = True

    def __init__(
        self,
        script: Iterable[Answer | Refuse],
        models: Sequence[str] = ("demo",),
        key: str = "",
        context_length: int = 400,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.models, self.key = deque(script), models, key
        self.context_length = context_length
        self.asked: list[dict[str, Any]] = []
        self.listable = threading.Event()
        self.listable.set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"

    def key_is_missing(self, handler: Handler) -> bool:
        if not self.key or handler.headers["Authorization"] == f"Bearer {self.key}":
            return False
        Refuse(401, "no valid API key", "invalid_api_key").reply(handler)
        return True

    def handle_error(self, *_: Any) -> None:
        """A client that leaves is no error."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


ServerMaker = Callable[..., StubServer]
