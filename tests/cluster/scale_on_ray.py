"""Replicas on a real Ray under more load than they hold: the queue fills and refuses, and another replica comes.

Run by `make test-cluster`, as run_on_ray.py is.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from run_on_ray import ROOT, chat, export_tiny, marked_replicas, processes, request, wait_until

QUEUE = 4
_SERVE_PORT = 8000  # `serve run` takes no other


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return export_tiny(tmp_path_factory.mktemp("scale"), hidden=256, positions=2048)


@pytest.fixture(scope="module")
def scaling(artifact):
    """The URL of one replica that may become two, and the mark of their processes."""
    options = {"artifact": str(artifact), "replicas": 1, "max_replicas": 2, "threads": 1, "slots": 1}
    options |= {"max_queue": QUEUE, "no_api_key": True}
    with marked_replicas("scale", options) as replicas:
        yield replicas


def ask(url, number, tokens=600):
    status, headers, body = request(url, "/v1/chat/completions", chat(f"nummer {number}", max_tokens=tokens))
    return status, headers.get("Retry-After"), json.loads(body)


def test_more_than_the_queue_holds_get_429_and_are_told_when_to_come_again(scaling):
    with ThreadPoolExecutor(24) as clients:
        answers = list(clients.map(lambda number: ask(scaling[0], number), range(24)))
    statuses = Counter(status for status, _, _ in answers)
    assert set(statuses) == {200, 429}, statuses
    assert statuses[200] >= QUEUE
    for status, retry_after, body in answers:
        if status == 429:
            assert int(retry_after) >= 1
            assert body["error"]["message"]
        else:
            assert body["choices"][0]["finish_reason"] in ("stop", "length")


def test_a_queue_brings_another_replica(scaling):
    url, mark = scaling

    def replicas():
        return len(set(processes(b"ray::ServeReplica:normistral:models", mark)))

    assert replicas() == 1
    enough = False

    def keep_asking(name):
        number = 0
        while not enough:
            number += 1
            status, _, body = ask(url, f"{name} {number}", tokens=200)
            assert status in (200, 429), body
            time.sleep(0.1 if status == 429 else 0)

    with ThreadPoolExecutor(QUEUE) as clients:
        asking = [clients.submit(keep_asking, name) for name in range(QUEUE)]
        try:
            wait_until(lambda: replicas() == 2)
        finally:
            enough = True
    for one in asking:
        one.result()


def test_the_command_serve_run_serves(artifact, tmp_path):
    """As docs/cluster.md has it, and Ctrl-C ends it."""
    command = [str(Path(sys.executable).with_name("serve")), "run", "normistral.cluster.serve:build"]
    command += [f"artifact={artifact}", "replicas=1", "threads=1", "no_api_key=true"]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    with (tmp_path / "said").open("wb") as said:
        running = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        url = f"http://127.0.0.1:{_SERVE_PORT}"
        try:
            wait_until(lambda: is_ready(url) or running.poll() is not None)
            assert running.poll() is None, (tmp_path / "said").read_text()[-2000:]
            assert ask(url, 1, tokens=8)[0] == 200
        finally:
            os.killpg(running.pid, signal.SIGINT)
            running.wait(60)


def is_ready(url):
    try:
        return request(url, "/ready")[0] == 200
    except OSError:
        return False
