"""Questions about a document, which the model reads once: also across restarts, and as a small service.

    python examples/ask_document.py ARTIFACT examples/texts/skolevedtak.txt "Hva skal bygges?" "Når er skolen ferdig?"
    python examples/ask_document.py ARTIFACT examples/texts/skolevedtak.txt --port 8010
    curl --data "Hvor mange elever er det plass til?" http://127.0.0.1:8010/

What the model has made of the document, its KV cache, is kept in a file beside it. It is used as long as document and
artifact are the same, and made anew when they are not.
"""

from __future__ import annotations

import argparse
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import normistral
from normistral.errors import SessionError

FORM = "\n\nSpørsmål: {}\nSvar:"
ENGLISH_FORM = "\n\nQuestion: {}\nAnswer:"
MOST_BYTES = 10_000  # of a question over the network


def read_document(model: normistral.Model, document: Path, session: Path) -> normistral.Prefix:
    """The document as the beginning of prompts: from the session file, or computed and saved there."""
    text = document.read_text(encoding="utf-8").strip()
    began = time.monotonic()
    if session.exists():
        try:
            prefix = model.restore_prefix(session)
            if prefix.prompt == text:
                report(f"{document.name} was restored in {time.monotonic() - began:.2f} s")
                return prefix
            reason = "the document has changed"
        except SessionError as exc:  # another artifact, other settings, a newer version, damage
            reason = exc.message
        report(f"{session.name} is made anew: {reason}")
    prefix = model.prefill(text)
    report(f"{document.name} was read in {time.monotonic() - began:.2f} s, and is kept in {session.name}")
    prefix.save(session)
    return prefix


def report(message: str) -> None:
    """Progress, apart from the answers."""
    print(message, file=sys.stderr)


def ask(document: normistral.Prefix, question: str, form: str = FORM) -> normistral.Completion:
    """One answer of one line at most. Every question follows the document itself, not the questions before it."""
    return document.generate(form.format(question.strip()), temperature=0, stop="\n", max_new_tokens=80)


def describe(timings: normistral.Timings) -> str:
    """What the kept cache was worth."""
    computed = timings.prompt_tokens - timings.cached_tokens
    return f"{timings.cached_tokens} tokens reused, {computed} computed, first token after {timings.ttft_s:.2f} s"


def make_server(document: normistral.Prefix, form: str, port: int) -> HTTPServer:
    """A service on this machine: a question as the body of a POST, its answer as text. One at a time, others wait."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # s: who sends nothing does not keep the others waiting

        def do_POST(self) -> None:
            """Answer a question."""
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 < length <= MOST_BYTES:
                return self.send_error(413 if length else 400, f"send a question of up to {MOST_BYTES} bytes")
            try:
                completion = ask(document, self.rfile.read(length).decode(), form)
            except (UnicodeDecodeError, normistral.NormistralError) as exc:
                return self.send_error(400, str(exc))
            answer = completion.text.strip().encode() + b"\n"
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            return None

        def log_message(self, *_: object) -> None:
            """Nothing: questions are nobody else's business."""

    return HTTPServer(("127.0.0.1", port), Handler)


def main(arguments: list[str] | None = None) -> None:
    """Answer the questions given, or serve."""
    parser = argparse.ArgumentParser(description="Ask a document.")
    parser.add_argument("artifact")
    parser.add_argument("document", type=Path, help="a text file in UTF-8")
    parser.add_argument("questions", nargs="*", metavar="QUESTION")
    parser.add_argument("--english", action="store_true", help="ask in English (for the demo model)")
    parser.add_argument("--session", type=Path, help="where the cache is kept (DOCUMENT.session)")
    parser.add_argument("--port", type=int, help="serve on this port of 127.0.0.1")
    options = parser.parse_intermixed_args(arguments)
    session = options.session or options.document.with_suffix(".session")
    form = ENGLISH_FORM if options.english else FORM
    with normistral.load(options.artifact) as model:
        document = read_document(model, options.document, session)
        for question in options.questions:
            completion = ask(document, question, form)
            print(f"{question}\n  {completion.text.strip()}\n  ({describe(completion.timings)})")
        if options.port is not None:
            with make_server(document, form, options.port) as server:
                report(f"questions are answered at http://127.0.0.1:{server.server_port}/")
                server.serve_forever()


if __name__ == "__main__":
    try:
        main()
    except normistral.NormistralError as exc:
        sys.exit(f"error: {exc.message}\nhint: {exc.hint}")
    except KeyboardInterrupt:
        pass
