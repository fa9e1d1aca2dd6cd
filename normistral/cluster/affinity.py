"""Which requests belong to one replica: those that begin alike, because it still has the beginning in its cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

SESSION_HEADER = "x-session-id"  # Ray Serve's own default
SHARED_CHARACTERS = 2048
_SHARED_TOKENS = 512


def routing_key(tenant: str, headers: Mapping[str, str], body: bytes) -> str:
    """A name that the requests have in common which one replica should answer.

    With a session header its value decides. Otherwise the beginning of the conversation up to its first user message
    does, which all its turns share; of that the first 2,048 characters, so that questions about one long text share it
    too. A tenant's requests never share a name with another's.

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
    prompt, messages = request.get("prompt"), request.get("messages")
    if isinstance(messages, list):
        told = "".join(_text(message) for message in _up_to_user(messages))[:SHARED_CHARACTERS]
    elif isinstance(prompt, str):
        told = prompt[:SHARED_CHARACTERS]
    else:
        told = repr(prompt[:_SHARED_TOKENS]) if isinstance(prompt, list) else ""
    return f"{request.get('model')!r} {told}"


def _up_to_user(messages: Sequence[Any]) -> Sequence[Any]:
    for count, message in enumerate(messages, 1):
        if isinstance(message, dict) and message.get("role") == "user":
            return messages[:count]
    return messages


def _text(message: Any) -> str:
    content = message.get("content") if isinstance(message, dict) else message
    return f"{message.get('role')}: {content}\n" if isinstance(message, dict) else repr(content)
