"""Asking a server in tests."""

import time
from contextlib import contextmanager

import httpx

http = httpx.Client()  # one: each would read the system's certificates


def ask(url: str, *, content: str = "Hei", key: str = "", **fields) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "ignore_eos": True, **fields}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return http.post(f"{url}/v1/chat/completions", json=body, timeout=30, headers=headers)


@contextmanager
def stream(url: str, *, content: str = "Hei", **fields):
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "ignore_eos": True, "stream": True}
    with http.stream("POST", f"{url}/v1/chat/completions", json=body | fields, timeout=30) as answer:
        yield answer


def gauge(url: str, name: str) -> float:
    lines = http.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"normistral_{name}{{"))


def wait_until(condition, wait_s: float = 10.0) -> None:
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def error_of(answer: httpx.Response) -> dict:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return error
