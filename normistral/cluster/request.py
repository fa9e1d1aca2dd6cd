"""Requests between ingress and replica as plain data, their router key, and joined metrics of replicas."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

Headers = list[tuple[bytes, bytes]]
SESSION_HEADER = "x-session-id"  # Ray Serve's own default
SHARED_CHARACTERS = 2048
_SHARED_TOKENS = 512


class ServeRequest(NamedTuple):
    """A request whose body has been read."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes


class ResponseStart(NamedTuple):
    """Status and headers of a response; pieces of the body follow."""

    status: int
    headers: Headers


def routing_key(tenant: str, headers: Mapping[str, str], body: bytes) -> str:
    """Router key: requests with a common prefix go to one replica, which has its KV cache.

    With a session header its value decides. Otherwise the beginning of the conversation up to its first user message
    does, instructions and system prompt first, which all its turns share; of that the first 2,048 characters, so that
    questions about one long text share it too. A tenant's requests never share a name with another's.

    Args:
        body: JSON, or anything else, which then is its own beginning.
    """
    session = headers.get(SESSION_HEADER)
    told = f"session {session}" if session else _beginning(body)
    return hashlib.sha256(f"{len(tenant)} {tenant} {told}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _beginning(body: bytes) -> str:
    try:
        request = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        request = None
    if not isinstance(request, dict):
        return hashlib.sha256(body).hexdigest()
    told = "".join(f"{name}: {request[name]}\n" for name in ("instructions", "system") if request.get(name))
    asked = next((request[name] for name in ("messages", "input", "prompt") if name in request), None)
    if isinstance(asked, list) and "prompt" in request:  # token ids, or several texts
        return f"{request.get('model')!r} {asked[:_SHARED_TOKENS]!r}"
    told += "".join(map(_text, _up_to_user(asked))) if isinstance(asked, list) else str(asked)
    return f"{request.get('model')!r} {told[:SHARED_CHARACTERS]}"


def _up_to_user(messages: Sequence[Any]) -> Sequence[Any]:
    for count, message in enumerate(messages, 1):
        if isinstance(message, dict) and message.get("role") == "user":
            return messages[:count]
    return messages


def _text(message: Any) -> str:
    content = message.get("content") if isinstance(message, dict) else message
    return f"{message.get('role')}: {content}\n" if isinstance(message, dict) else repr(content)


def join_metrics(texts: Mapping[str, str]) -> str:
    """One text in Prometheus' format.

    Args:
        texts: in the same format, by the value that the label `replica` gets.
    """
    registry = CollectorRegistry()
    registry.register(_Joined(texts))
    return generate_latest(registry).decode()


class _Joined(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    joined.add_sample(sample.name, sample.labels | {"replica": replica}, sample.value)
        yield from families.values()
