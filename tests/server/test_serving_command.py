"""`normistral serve` as a process: its options, its signals, what it prints and what it never does."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served_models import HELPERS, make_served
from serving_clients import ask, gauge, http, stream, wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random text, 5 ms a token."""
    return make_served(tmp_path_factory.mktemp("served") / "m", pause_s=0.005)


class Command:
    """`normistral serve` in a process of its own."""

    def __init__(self, folder, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(HELPERS / "served_models.py"),
                "serve",
                str(folder),
                "--port",
                "0",
                *("--json", "--batching", "off"),
                *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def url(self) -> str:
        url = json.loads(self.process.stdout.readline())["url"]
        wait_until(lambda: http.get(f"{url}/ready").status_code == 200)
        return url

    def end(self) -> tuple[int, str]:
        _, stderr = self.process.communicate(timeout=20)
        return self.process.returncode, stderr


def test_sigterm_lets_answers_end_and_takes_no_new_ones(folder) -> None:
    command = Command(folder)
    url = command.url()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(ask, url, max_tokens=150)
        wait_until(lambda: gauge(url, "running_answers") == 1)
        command.process.send_signal(signal.SIGTERM)
        wait_until(lambda: http.get(f"{url}/ready").status_code == 503)
        late = ask(url, max_tokens=1)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "stopping")
        assert running.result().status_code == 200
    code, stderr = command.end()
    assert code == 0
    assert stderr.endswith("stopped\n")


def test_after_the_grace_time_answers_end_with_an_error(folder) -> None:
    command = Command(folder, "--grace-seconds", "0.3")
    url = command.url()
    with stream(url, max_tokens=300) as answer:
        lines = answer.iter_lines()
        next(lines)
        command.process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
    assert command.end()[0] == 0


def test_a_second_signal_ends_at_once(folder) -> None:
    command = Command(folder)
    url = command.url()
    with stream(url, max_tokens=300) as answer:
        lines = answer.iter_lines()
        next(lines)
        command.process.send_signal(signal.SIGINT)
        wait_until(lambda: http.get(f"{url}/ready").status_code == 503)
        command.process.send_signal(signal.SIGINT)
        assert '"code":"stopping"' in [line for line in lines if line][-1]
    assert command.end()[0] == 0


def test_no_text_and_no_key_is_ever_printed(tmp_path) -> None:
    folder = make_served(tmp_path / "m", fault="bug FEIL")
    keys = tmp_path / "keys"
    keys.write_text("hemmelig-nøkkel".replace("ø", "o") + "-0001 ola\n")
    keys.chmod(0o600)
    command = Command(folder, "--api-key-file", str(keys), "--debug")
    url = command.url()
    key = "hemmelig-nokkel-0001"
    secret = "fødselsnummeret"
    headers = {"authorization": f"Bearer {key}"}
    assert ask(url, key=key, content=secret, max_tokens=20).status_code == 200
    for body in ({"prompt": secret}, {"model": "m", "messages": [{"role": secret, "content": secret}], secret: secret}):
        http.post(f"{url}/v1/chat/completions?q={secret}", json=body, headers=headers)
    assert ask(url, key=key, content=f"{secret} FEIL", max_tokens=1).status_code == 503  # the worker ends by a bug
    metrics = http.get(f"{url}/metrics", headers=headers).text
    command.process.send_signal(signal.SIGTERM)
    code, stderr = command.end()
    assert code == 0
    assert "RuntimeError" in stderr
    for text in (stderr, metrics):
        assert secret not in text
        assert key not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--max-context", "100", "--cache-mib", "1", "--slots", "0"], "slots"),
        (["--port", "99999"], "port"),
        (["--host", "203.0.113.1"], "cannot listen"),
        (["--api-key-file", "/nonexistent"], "cannot read the keys"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(folder, arguments, words) -> None:
    command = Command(folder, *arguments)
    code, stderr = command.end()
    assert code == 2
    assert words in stderr
    assert "hint:" in stderr


def test_the_worker_dies_with_a_server_that_is_killed(folder) -> None:
    command = Command(folder)
    command.url()
    stats = {path.parent.name: path.read_text() for path in Path("/proc").glob("[0-9]*/stat")}
    parents = {pid: stat.rpartition(")")[2].split()[1] for pid, stat in stats.items()}
    children = [pid for pid, parent in parents.items() if parent == str(command.process.pid)]
    assert children
    command.process.kill()
    command.end()
    for child in children:
        wait_until(lambda child=child: not _alive(int(child)), 5)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
