"""The front of the replicas, without Ray: its errors are the single server's, in the form of the API that was asked."""

import asyncio
import json
import sys
import types

import httpx
import pytest

from normistral.cluster.request import ResponseStart
from normistral.server.auth import Keys
from normistral.server.limits import ServerLimits

KEY = {"authorization": "Bearer 0123456789abcdef"}
PATHS = ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat", "/api/generate")
EVENTS, LINES = "text/event-stream; charset=utf-8", "application/x-ndjson"


@pytest.fixture
def ray(monkeypatch):
    """Stands for Ray: the exceptions that Serve's handles raise."""
    names = ("ray", "ray.exceptions", "ray.serve", "ray.serve.exceptions", "ray.serve.handle")
    modules = {name: types.ModuleType(name) for name in names}
    ours, serve = modules["ray.exceptions"], modules["ray.serve.exceptions"]
    ours.RayError = type("RayError", (Exception,), {})
    ours.RayActorError = type("RayActorError", (ours.RayError,), {})
    ours.RayTaskError = type("RayTaskError", (ours.RayError,), {})
    serve.RayServeException = type("RayServeException", (Exception,), {})
    for name in ("BackPressureError", "DeploymentUnavailableError", "ReplicaUnavailableError"):
        setattr(serve, name, type(name, (serve.RayServeException,), {}))
    modules["ray.serve.handle"].DeploymentHandle = object
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "normistral.cluster.ingress", raising=False)
    yield types.SimpleNamespace(**vars(ours) | vars(serve))
    sys.modules.pop("normistral.cluster.ingress", None)


class Pieces:
    """A replica's answer: what it gives, and an exception that ends it."""

    def __init__(self, pieces):
        self._pieces = iter(pieces)

    def __aiter__(self):
        return self

    async def __anext__(self):
        piece = next(self._pieces, None)
        if piece is None:
            raise StopAsyncIteration
        if isinstance(piece, Exception):
            raise piece
        if piece == "wait":
            await asyncio.sleep(60)
        return piece

    def cancel(self):
        pass


class Handle:
    """Serve's handle of the replicas."""

    def __init__(self, *pieces):
        self._pieces = pieces
        self.answer = types.SimpleNamespace(remote=lambda request: Pieces(pieces))

    def options(self, **how):
        return self

    def broadcast(self, method):
        async def results_async(**how):
            if isinstance(self._pieces[0], Exception):
                raise self._pieces[0]
            return [False]

        return types.SimpleNamespace(results_async=results_async)


def ask(path, *pieces, body=None, headers=KEY, limits=None, method="POST"):
    from normistral.cluster.ingress import Ingress

    ingress = Ingress(Handle(*pieces), limits or ServerLimits(), Keys({"0123456789abcdef": "kari"}), busy_s=7)

    async def app(scope, receive, send):
        await (await ingress(None))(scope, receive, send)

    async def run():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            content = json.dumps({"model": "norsk"} if body is None else body)
            return await client.request(
                method, path, content=content, headers={"content-type": "application/json", **headers}
            )

    return asyncio.run(asyncio.wait_for(run(), 30))


def told(path, document):
    """The words of an error, in the form of the API that a path belongs to."""
    if path.startswith("/api/"):
        assert list(document) == ["error"]
        return document["error"]
    if path == "/v1/messages":
        assert document["type"] == "error"
        assert set(document["error"]) == {"type", "message", "details"}
        assert set(document["error"]["details"]) == {"error_code"}
    else:
        assert set(document["error"]) == {"message", "type", "param", "code"}
    return document["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
def test_what_no_replica_answers_is_told_in_the_form_of_the_api(ray, path):
    for error, status, words in (
        (ray.BackPressureError(), 429, "too many requests"),
        (ray.RayActorError(), 503, "gone"),
        (ray.ReplicaUnavailableError(), 503, "gone"),
        (ray.DeploymentUnavailableError(), 503, "no replica"),
        (ray.RayTaskError("Hva er hemmeligheten?"), 500, "a replica failed (RayTaskError)"),
    ):
        answer = ask(path, error)
        assert answer.status_code == status, error
        message = told(path, answer.json())
        assert words in message
        assert message.endswith(")")  # a hint
        assert "hemmelig" not in answer.text
        assert ("retry-after" in answer.headers) == (status != 500)
        assert answer.headers["x-request-id"]
    assert ask(path, ray.BackPressureError()).headers["retry-after"] == "7"


@pytest.mark.parametrize("path", PATHS)
def test_refusals_of_the_front_have_the_form_of_the_api(ray, path):
    small = ServerLimits(body_bytes=1000)
    refused = [
        (401, "key", ask(path, headers={})),
        (401, "key", ask(path, headers={"authorization": "Bearer wrong-wrong-wrong"})),
        (413, "more than 1000 bytes", ask(path, body={"model": "x" * 2000}, limits=small)),
        (415, "JSON", ask(path, headers=KEY | {"content-type": "text/plain", "origin": "https://example.org"})),
        (503, "in time", ask(path, "wait", limits=ServerLimits(queue_s=0.05, request_s=0.05))),
    ]
    for status, words, answer in refused:
        assert answer.status_code == status, answer.text
        assert words in told(path, answer.json())


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_whose_replica_dies_ends_with_an_error_of_its_api(ray, path):
    kind = LINES if path.startswith("/api/") else EVENTS
    start = ResponseStart(200, [(b"content-type", kind.encode())])
    answer = ask(path, start, b"begun\n\n", ray.RayActorError())
    assert answer.status_code == 200
    begun, _, end = answer.text.partition("begun\n\n")
    assert begun == ""
    if path.startswith("/api/"):
        assert end.endswith("\n")
        document = json.loads(end)
        assert "gone" in told(path, document)
        return
    *named, data, empty, rest = end.split("\n")
    assert (empty, rest) == ("", "")
    document = json.loads(data.removeprefix("data: "))
    assert named == ([] if path == "/v1/chat/completions" else ["event: error"])
    if path == "/v1/responses":
        assert (document["type"], document["code"], document["sequence_number"]) == ("error", "replica_lost", 1)
        assert "gone" in document["message"]
    else:
        assert "gone" in told(path, document)


def test_who_asks_whether_it_is_ready_is_told_what_is_missing(ray):
    for piece, code in (
        (ray.DeploymentUnavailableError(), "no_replica"),
        (b"", "not_ready"),
        (TimeoutError(), "not_ready"),
    ):
        answer = ask("/ready", piece, method="GET")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == code
        assert answer.headers["retry-after"]
