"""Batch jobs and replicas on a real Ray on this machine, with processes killed.

Needs ray, which the ordinary environment does not have; `make test-cluster` runs it in one of its own.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_models import make_mistral

from normistral.batch.journal import parts_folder

ROOT = Path(__file__).parents[2]
ROWS = 40
_PATIENCE_S = 120


def export_tiny(folder, hidden, positions):
    from normistral import export_model

    checkpoint = make_mistral(folder / "checkpoint", hidden=hidden, positions=positions, chat=True)
    export_model(str(checkpoint), folder / "tiny", weights="fp16", verify=False)
    return folder / "tiny"


@contextmanager
def marked_replicas(name, options):
    """The URL of replicas with these options, and the mark of their processes."""
    from normistral.cluster.serve import serving

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ["NORMISTRAL_TEST"] = mark = f"{name}-{os.getpid()}"
    with serving(options, port) as url:
        yield url, mark
    del os.environ["NORMISTRAL_TEST"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return export_tiny(tmp_path_factory.mktemp("cluster"), hidden=64, positions=256)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    source = tmp_path_factory.mktemp("documents") / "in.jsonl"
    lines = [{"id": f"d{number}", "text": f"blåbær {number}"} for number in range(ROWS)]
    lines[7] = {"id": "bad"}
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return source


def job(artifact, documents, output, *options):
    return [
        *(sys.executable, "-m", "normistral", "batch", str(artifact), str(documents), str(output)),
        *("--instruction", "{text}", "--max-new-tokens", "24", "--temperature", "0", "--exact", *options),
    ]


@pytest.fixture(scope="module")
def known(artifact, documents, tmp_path_factory):
    """What one model in one process answers."""
    output = tmp_path_factory.mktemp("known") / "out.jsonl"
    subprocess.run(job(artifact, documents, output), check=True, timeout=_PATIENCE_S)
    assert len(output.read_text("utf-8").splitlines()) == ROWS
    return output.read_bytes()


def start(command, mark):
    return subprocess.Popen(command, env=os.environ | {"NORMISTRAL_TEST": mark}, cwd=ROOT)


def answers(output):
    files = parts_folder(output).glob("*.jsonl")
    return sum(b'"row"' in line for file in files for line in file.read_bytes().split(b"\n")[:-1])


def wait_until(condition):
    end = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def processes(name, mark):
    """Processes that Ray calls so and this test started."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                told, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            except OSError:
                continue
            if name in told and f"NORMISTRAL_TEST={mark}".encode() in environment:
                yield int(folder.name)


def test_workers_answer_as_one_process_does(artifact, documents, known, tmp_path):
    output = tmp_path / "out.jsonl"
    subprocess.run(job(artifact, documents, output, "--workers", "2"), check=True, timeout=_PATIENCE_S, cwd=ROOT)
    assert output.read_bytes() == known
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_killed_worker_costs_nothing(artifact, documents, known, tmp_path):
    output, mark = tmp_path / "out.jsonl", f"worker-{os.getpid()}"
    driver = start(job(artifact, documents, output, "--workers", "2"), mark)
    wait_until(lambda: driver.poll() is not None or answers(output) >= 5)
    os.kill(next(processes(b"MapWorker", mark)), signal.SIGKILL)
    assert driver.wait(_PATIENCE_S) == 0
    assert output.read_bytes() == known


def test_a_killed_driver_goes_on_where_it_was(artifact, documents, known, tmp_path):
    output, mark = tmp_path / "out.jsonl", f"driver-{os.getpid()}"
    command = job(artifact, documents, output, "--workers", "2", "--json")
    driver = start(command, mark)
    wait_until(lambda: driver.poll() is not None or answers(output) >= 5)
    driver.kill()
    driver.wait()
    assert not output.exists()
    done = subprocess.run(command, capture_output=True, timeout=_PATIENCE_S, cwd=ROOT, check=True)
    summary = json.loads(done.stdout)
    assert summary["found"] >= 5
    assert (summary["rows"], summary["failed"]) == (ROWS, 1)
    assert output.read_bytes() == known
    wait_until(lambda: not list(processes(b"MapWorker", mark)))


def test_a_model_that_cannot_be_loaded_is_one_error(artifact, documents, tmp_path):
    command = job(artifact, documents, tmp_path / "out.jsonl", "--workers", "1", "--set", "NO_SUCH_SETTING=1")
    done = subprocess.run(command, capture_output=True, timeout=_PATIENCE_S, cwd=ROOT)
    assert done.returncode == 2
    *_, error, hint = done.stderr.decode().splitlines()
    assert error.startswith("error:")
    assert "NO_SUCH_SETTING" in error
    assert hint.startswith("hint:")
    assert b"Traceback" not in done.stderr


# replicas


def request(url, path, body=None, headers=None):
    """(status, headers, body) of one request."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(asked, timeout=_PATIENCE_S) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


KEY = {"Authorization": "Bearer 0123456789abcdef"}


@pytest.fixture(scope="module")
def replicas(artifact, tmp_path_factory):
    """The URL of two replicas, and the mark of their processes."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("0123456789abcdef kari\n")
    keys.chmod(0o600)
    options = {"artifact": str(artifact), "replicas": 2, "threads": 1, "api_key_file": str(keys), "exact": True}
    options["batching"] = "off"
    with marked_replicas("serve", options) as replicas:
        yield replicas


def chat(question="blåbær", **more):
    messages = [{"role": "user", "content": question}]
    return {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0} | more


def test_the_front_answers_like_the_single_server(replicas):
    url, _ = replicas
    assert request(url, "/health")[0] == 200
    assert request(url, "/ready")[0] == 200
    status, _, body = request(url, "/v1/chat/completions", chat(), KEY)
    assert status == 200, body
    whole = json.loads(body)["choices"][0]["message"]["content"]
    status, headers, body = request(url, "/v1/chat/completions", chat(stream=True), KEY)
    assert headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in body.splitlines() if line]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert "".join(pieces) == whole


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/v1/chat/completions", chat(), {}, 401),
        ("/v1/chat/completions", chat(), {"Authorization": "Bearer wrong-wrong-wrong"}, 401),
        ("/metrics", None, {}, 401),
        ("/v1/chat/completions", chat(model="none"), KEY, 404),
        ("/v1/chat/completions", chat("x" * 2**21), KEY, 413),
        ("/v1/chat/completions", chat(max_tokens=-1), KEY, 400),
        ("/nothing", None, KEY, 404),
    ],
)
def test_refusals_have_openais_shape(replicas, path, body, headers, status):
    found, _, told = request(replicas[0], path, body, headers)
    assert found == status
    assert json.loads(told)["error"]["message"]


def test_turns_of_one_conversation_find_their_beginning_computed(replicas):
    for turn in range(3):
        _, _, body = request(replicas[0], "/v1/chat/completions", chat("en lang samtale " * 10), KEY)
        cached = json.loads(body)["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert (cached > 100) == (turn > 0)  # the template begins alike for everybody


def test_figures_of_front_and_replicas_come_together(replicas):
    status, _, text = request(replicas[0], "/metrics", headers=KEY)
    assert status == 200
    names = set(re.findall(r'replica="(\w+)"', text))
    assert len(names) == 3
    assert "front" in names


def test_requests_wait_for_a_worker_process_that_is_started_anew(replicas):
    url, mark = replicas
    for worker in processes(b"normistral.server.worker", mark):
        os.kill(worker, signal.SIGKILL)
    wait_until(lambda: request(url, "/ready")[0] == 503)
    status, _, body = request(url, "/v1/chat/completions", chat("etterpå"), KEY)
    assert status == 200, body


def test_a_killed_replica_is_replaced_and_nothing_is_lost_without_an_error(replicas):
    url, mark = replicas
    before = set(processes(b"ray::ServeReplica:normistral:models", mark))
    assert len(before) == 2
    os.kill(before.pop(), signal.SIGKILL)
    statuses = set()

    def both_back():
        status, _, body = request(url, "/v1/chat/completions", chat(f"nummer {len(statuses)}"), KEY)
        statuses.add(status)
        assert status == 200 or json.loads(body)["error"]["code"], body
        return len(set(processes(b"ray::ServeReplica:normistral:models", mark))) == 2

    wait_until(both_back)
    assert 200 in statuses
    assert statuses <= {200, 503}
