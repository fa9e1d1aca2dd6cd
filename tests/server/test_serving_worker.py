"""A worker process that stands still, and one whose artifact was exchanged under it."""

import asyncio
import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
from served_models import make_served, serving
from serving_clients import ask, error_of, http, wait_until

from normistral.runtime.engines.settings import EngineConfig
from normistral.server import ipc, worker_client
from normistral.server.auth import KEYS_VARIABLE
from normistral.server.backends.base import BatchSettings
from normistral.server.ipc import HEARTBEAT_S, Heartbeat, HeartbeatMonitor, Load
from normistral.server.limits import ServerLimits
from normistral.server.worker_client import WorkerClient

LOAD = Load(b"m", EngineConfig(), BatchSettings("auto", 0, 0))
QUICK = ServerLimits(grace_s=0.2)


def run_worker(monkeypatch, tmp_path, how: str, wait_s: float) -> tuple[int, bool]:
    """Restarts within a time, and whether a process is ready then."""
    monkeypatch.setenv("STILL_WORKER", how)
    monkeypatch.setenv("STILL_WORKER_MARKER", str(tmp_path / "started"))

    async def run() -> tuple[int, bool]:
        client = WorkerClient("m", LOAD, "still_worker")
        client.start()
        try:
            async with asyncio.timeout(wait_s):
                while not client.restarts or client.loaded is None:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pass
        state = client.restarts, client.loaded is not None
        await client.close()
        return state

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("how", "told"),
    [("stopped", "it stood still for 1 s"), ("silent", "it stood still for 1 s"), ("busy", "its engine stood still")],
)
def test_a_worker_that_stands_still_is_replaced(monkeypatch, tmp_path, caplog, how, told) -> None:
    monkeypatch.setattr(ipc, "_SILENT_S", 1.0)
    monkeypatch.setattr(ipc, "_STILL_S", 2.0)
    assert run_worker(monkeypatch, tmp_path, how, 30) == (1, True)
    assert told in caplog.text
    assert "memory" not in caplog.text


def test_a_worker_that_computes_or_waits_is_left_alone(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(ipc, "_SILENT_S", 1.0)
    monkeypatch.setattr(ipc, "_STILL_S", 1.0)
    assert run_worker(monkeypatch, tmp_path, "works", 3) == (0, True)
    assert run_worker(monkeypatch, tmp_path, "idle", 3) == (0, True)


def test_a_process_that_cannot_be_started_is_tried_again(monkeypatch, tmp_path, caplog) -> None:
    started = asyncio.create_subprocess_exec
    missing = [errno.EAGAIN, errno.EMFILE]

    async def start(*command, **how):
        if missing:
            code = missing.pop()
            raise OSError(code, os.strerror(code))
        return await started(*command, **how)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    with serving(make_served(tmp_path / "m", answers=["Ja."]), limits=QUICK) as url:
        assert ask(url).status_code == 200
    assert "no worker process could be started: Too many open files" in caplog.text
    assert "no worker process could be started: Resource temporarily unavailable" in caplog.text


def test_a_step_without_beats_may_last_while_the_processor_works(monkeypatch) -> None:
    """Native code may hold the interpreter while it compiles; a process without processor time does nothing."""
    cpu_s = 0.0
    monkeypatch.setattr(ipc, "_processor_seconds", lambda pid: cpu_s)
    monitor = HeartbeatMonitor(1)
    for _ in range(int(60 / HEARTBEAT_S)):
        cpu_s += HEARTBEAT_S
        assert monitor.tick(loading=False) is None
    reasons = [monitor.tick(loading=False) for _ in range(int(5 / HEARTBEAT_S))]
    assert reasons[-1] == "it stood still for 5 s"
    monitor = HeartbeatMonitor(1)
    ticks = 0
    while (reason := monitor.tick(loading=False)) is None:
        cpu_s += HEARTBEAT_S
        ticks += 1
    assert (reason, ticks * HEARTBEAT_S) == ("it gave no sign of life for 120 s", pytest.approx(120, abs=1))


def test_a_long_step_ends_a_worker_only_where_nothing_is_computed(monkeypatch) -> None:
    monkeypatch.setattr(ipc, "_processor_seconds", lambda pid: 0.0)

    def seconds_until_ended(share: float, loading: bool = False) -> float:
        monitor, ticks = HeartbeatMonitor(1), 0
        while monitor.tick(loading=loading) is None and ticks * HEARTBEAT_S < 1e4:
            ticks += 1
            monitor.hear(Heartbeat(True, 0, ticks * HEARTBEAT_S * share))
        return ticks * HEARTBEAT_S

    assert seconds_until_ended(0.0) == pytest.approx(15, abs=1)
    assert seconds_until_ended(0.0, loading=True) == pytest.approx(180, abs=1)
    assert seconds_until_ended(0.5) == pytest.approx(900, abs=1)


def test_a_stopped_worker_of_a_server_answers_again_within_seconds(tmp_path) -> None:
    with serving(make_served(tmp_path / "m"), QUICK) as url:
        (worker,) = children()
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: http.get(f"{url}/ready").status_code == 503, 8)
        wait_until(lambda: http.get(f"{url}/ready").status_code == 200, 30)
        assert ask(url, max_tokens=1).status_code == 200


@pytest.mark.parametrize("change", ["other", "gone", "damaged"])
def test_what_is_loaded_again_is_what_was_opened(tmp_path, change, caplog, monkeypatch, capfd) -> None:
    monkeypatch.setattr(worker_client, "_LONGEST_PAUSE_S", 0.5)
    folder = make_served(tmp_path / "m")
    with serving(folder, QUICK) as url:
        kept = tmp_path / "kept"
        shutil.copytree(folder, kept)
        if change == "damaged":
            (folder / "normistral.json").write_text("{}")
        else:
            shutil.rmtree(folder)
        if change == "other":
            make_served(folder, answers=["Noe annet"])
        (worker,) = children()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: http.get(f"{url}/ready").status_code == 503)
        wait_until(lambda: "could not be loaded again" in error_of(http.get(f"{url}/ready"))["message"])
        answer = ask(url, max_tokens=1)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "not_loaded")
        caplog.clear()
        shutil.rmtree(folder, ignore_errors=True)
        kept.rename(folder)
        wait_until(lambda: http.get(f"{url}/ready").status_code == 200, 30)
        assert ask(url, max_tokens=1).status_code == 200
        assert "memory" not in caplog.text
        assert "Fatal" not in capfd.readouterr().err


def test_keys_are_not_in_the_environment_of_the_worker(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, "hemmelig-nokkel-0001")
    with serving(make_served(tmp_path / "m"), QUICK):
        (worker,) = children()
        for file in ("environ", "cmdline"):
            assert b"hemmelig" not in Path(f"/proc/{worker}/{file}").read_bytes()
        assert b"PATH=" in Path(f"/proc/{worker}/environ").read_bytes()


def children() -> list[int]:
    """Worker processes of this one."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if path.read_text().rpartition(")")[2].split()[1] == str(os.getpid())
        and b"served_models" in path.with_name("cmdline").read_bytes()
    ]
