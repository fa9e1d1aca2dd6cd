"""Models that are loaded when they are asked for, within a budget, and unloaded for others."""

import asyncio
import errno
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from served_models import make_served, open_served
from serving_clients import ask, error_of, http, stream, wait_until

from normistral.artifact.artifact import Artifact
from normistral.errors import EngineError, UsageError
from normistral.server import residency
from normistral.server.app import create_app
from normistral.server.auth import Keys
from normistral.server.limits import MIB, ServerLimits
from normistral.server.residency import ResidencyOptions
from normistral.server.server import background_server
from normistral.server.startup import EngineOptions, find_artifacts, open_artifacts, plan_residency

LIMITS = ServerLimits(grace_s=0.2)
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Three models, each with an answer of its own, and one that cannot be loaded."""
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        make_served(root / name, answers=[f"Jeg er {name}."] * 500, pause_s=0.002)
    make_served(root / "broken", fault="load")
    return root


@contextmanager
def serving(
    folders: Path,
    names=NAMES,
    *,
    room_for: float = 1,
    limits: ServerLimits = LIMITS,
    keys: Keys | None = None,
    **options,
) -> Iterator[str]:
    handlers = [open_served(folders / name, limits) for name in names]
    budget = int(room_for * max(one.memory_bytes for one in handlers))
    residency_options = ResidencyOptions(budget, **options)
    app = create_app(handlers, limits, keys, worker_module="served_models", residency=residency_options)
    with background_server(app) as url:
        yield url


def workers() -> list[int]:
    """Worker processes of this one that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if (
                parent == str(os.getpid())
                and state != "Z"
                and b"served_models" in path.with_name("cmdline").read_bytes()
            ):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def states(url: str) -> dict[str, str]:
    return {card["id"]: card["state"] for card in http.get(f"{url}/v1/models").json()["data"]}


def text_of(answer) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def ask_for(url: str, name: str, **fields):
    return ask(url, model=name, ignore_eos=False, **fields)


def count(url: str, metric: str) -> Counter:
    found = Counter()
    for line in http.get(f"{url}/metrics").text.splitlines():
        if line.startswith(f"normistral_{metric}{{"):
            found[line.partition('model="')[2].partition('"')[0]] += int(float(line.split()[-1]))
    return found


def test_each_is_loaded_when_it_is_asked_for_and_the_least_recently_used_goes(folders) -> None:
    with serving(folders, room_for=2.5) as url:
        assert http.get(f"{url}/ready").status_code == 200
        assert states(url) == {"a": "loaded", "b": "loaded", "c": "unloaded"}
        assert text_of(ask_for(url, "a")) == "Jeg er a."
        assert text_of(ask_for(url, "b")) == "Jeg er b."
        assert text_of(ask_for(url, "c")) == "Jeg er c."
        assert states(url) == {"a": "unloaded", "b": "loaded", "c": "loaded"}
        assert http.get(f"{url}/ready").status_code == 200
        assert text_of(ask_for(url, "a")) == "Jeg er a."
        assert states(url) == {"a": "loaded", "b": "unloaded", "c": "loaded"}
        names = [one["name"] for one in http.get(f"{url}/api/ps").json()["models"]]
        assert names == ["a:latest", "c:latest"]
        assert len(http.get(f"{url}/api/tags").json()["models"]) == 3
        assert count(url, "model_loads_total") == Counter(a=2, b=1, c=1)
        assert count(url, "model_unloads_total") == Counter(a=1, b=1)


def test_three_at_once_never_take_more_than_there_is(folders, monkeypatch) -> None:
    monkeypatch.setattr(residency, "_TURN_S", 0.1)
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, len(workers()))

    with serving(folders, on_demand=frozenset(NAMES)) as url, ThreadPoolExecutor(7) as pool:
        watching = pool.submit(watch)
        answers = [pool.submit(ask_for, url, name) for name in NAMES * 2]
        try:
            texts = Counter(text_of(answer.result()) for answer in answers)
        finally:
            over.set()  # or the pool would wait for the watch for ever
        watching.result()
    assert texts == {"Jeg er a.": 2, "Jeg er b.": 2, "Jeg er c.": 2}
    assert most == 1


def test_two_under_load_take_turns_and_each_serves_more_than_one_answer(folders, monkeypatch) -> None:
    monkeypatch.setattr(residency, "_TURN_S", 0.5)
    with serving(folders, ("a", "b")) as url, ThreadPoolExecutor(8) as pool:

        def go_on(name: str) -> list[str]:
            return [text_of(ask_for(url, name)) for _ in range(10)]

        texts = [(name, pool.submit(go_on, name)) for name in ("a", "b") * 4]
        for name, asked in texts:
            assert set(asked.result()) == {f"Jeg er {name}."}
        loads = count(url, "model_loads_total")
    assert 1 <= loads["a"] <= 8, loads
    assert 1 <= loads["b"] <= 8, loads


def test_one_that_answers_is_not_unloaded(folders, monkeypatch) -> None:
    monkeypatch.setattr(residency, "_TURN_S", 0.0)
    with serving(folders, ("a", "b")) as url, ThreadPoolExecutor() as pool:
        with stream(url, model="a", max_tokens=200) as answer:
            lines = answer.iter_lines()
            next(lines)
            (worker,) = workers()
            other = pool.submit(ask_for, url, "b")
            late = []
            for line in lines:
                late.append(line)
                if line.startswith("data: {") and '"finish_reason":null' in line:
                    assert workers() == [worker]
        assert "data: [DONE]" in late
        assert text_of(other.result()) == "Jeg er b."


def test_who_waits_too_long_is_told_and_others_go_on(folders, monkeypatch) -> None:
    monkeypatch.setattr(residency, "_TURN_S", 0.0)
    limits = ServerLimits(queue_s=0.3, grace_s=0.2)
    with serving(folders, ("a", "b"), limits=limits) as url, ThreadPoolExecutor() as pool:
        long = pool.submit(ask, url, model="a", max_tokens=350)
        wait_until(lambda: count(url, "running_answers")["a"] == 1)
        refused = ask_for(url, "b")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "queue_timeout")
        assert "b was not loaded within 0.3 s" in error_of(refused)["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert long.result().status_code == 200
        assert text_of(ask_for(url, "a")) == "Jeg er a."


def test_one_that_cannot_be_loaded_says_so_and_harms_nobody(folders, monkeypatch) -> None:
    monkeypatch.setattr(residency, "_RETRY_S", 1.0)
    with serving(folders, ("broken", "a"), room_for=1.5) as url:
        refused = ask_for(url, "broken")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "not_loaded")
        assert "it would not load" in error_of(refused)["message"]
        assert "retry-after" in refused.headers
        wait_until(lambda: states(url)["broken"] == "failed")
        assert http.get(f"{url}/ready").status_code == 200
        assert text_of(ask_for(url, "a")) == "Jeg er a."
        before = count(url, "model_loads_total")["broken"]
        script = folders / "broken" / "script.json"
        kept = script.read_text()
        script.write_text(json.dumps(json.loads(kept) | {"fault": "", "answers": ["Nå går det."]}))
        try:
            time.sleep(1.0)
            assert text_of(ask_for(url, "broken")) == "Nå går det."
        finally:
            script.write_text(kept)
        assert count(url, "model_loads_total")["broken"] == before + 1


def test_a_process_that_dies_while_it_loads_is_a_failed_load(folders, monkeypatch) -> None:
    monkeypatch.setenv("DYING_WORKER_SIGNAL", "SIGKILL")
    handlers = [open_served(folders / name, LIMITS) for name in NAMES]
    options = ResidencyOptions(on_demand=frozenset(NAMES))
    with background_server(create_app(handlers, LIMITS, worker_module="dying_worker", residency=options)) as url:
        refused = ask_for(url, "a")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "not_loaded")
        assert "its process ended while it loaded (SIGKILL" in error_of(refused)["message"]


def test_a_process_that_cannot_be_started_is_a_failed_load(folders, monkeypatch) -> None:
    async def start(*command, **how):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with serving(folders, on_demand=frozenset(NAMES)) as url:
        monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
        refused = ask_for(url, "a")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "not_loaded")
        assert "it could not be started: Cannot allocate memory" in error_of(refused)["message"]
        assert "retry-after" in refused.headers
        wait_until(lambda: states(url)["a"] == "failed")
        monkeypatch.undo()
        assert text_of(ask_for(url, "b")) == "Jeg er b."


def test_where_none_can_be_loaded_the_server_ends(folders) -> None:
    with pytest.raises(EngineError, match="it would not load"), serving(folders, ("broken",), room_for=3):
        pass


def test_idle_models_are_unloaded_and_come_back(folders) -> None:
    with serving(folders, ("a",), idle_s=0.3) as url:
        assert text_of(ask_for(url, "a", seed=1, temperature=1)) == "Jeg er a."
        wait_until(lambda: states(url) == {"a": "unloaded"})
        wait_until(lambda: not workers())
        assert http.get(f"{url}/ready").status_code == 200
        answer = ask_for(url, "a", seed=1)
        assert text_of(answer) == "Jeg er a."
        assert answer.json()["system_fingerprint"]
        assert count(url, "model_unloads_total")["a"] >= 1


def test_keep_alive_of_ollama(folders) -> None:
    def load(url: str, **fields):
        answer = http.post(f"{url}/api/generate", json={"model": "a", **fields}, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["done_reason"]

    def expiry(url: str) -> str:
        (model,) = http.get(f"{url}/api/ps").json()["models"]
        return model["expires_at"]

    with serving(folders, ("a",), idle_s=3600.0) as url:
        assert not expiry(url).startswith("9999")
        assert load(url, keep_alive=-1) == "load"
        assert expiry(url).startswith("9999")
        assert load(url, keep_alive="5m") == "load"
        assert not expiry(url).startswith("9999")
        assert load(url, keep_alive=0) == "unload"
        wait_until(lambda: states(url) == {"a": "unloaded"})
        assert http.get(f"{url}/api/ps").json() == {"models": []}
        assert load(url) == "load"
        assert states(url) == {"a": "loaded"}
        for wrong in ("soon", "5", "5x", "", "m", "-"):
            refused = http.post(f"{url}/api/generate", json={"model": "a", "keep_alive": wrong})
            assert refused.status_code == (200 if wrong == "5" else 400), wrong


@pytest.mark.parametrize(("idle_s", "keys"), [(None, None), (3600.0, Keys({"k" * 20: "ola", "l" * 20: "kari"}))])
def test_keep_alive_is_not_for_clients_where_models_stay_or_keys_share_them(folders, idle_s, keys) -> None:
    headers = {"authorization": f"Bearer {'k' * 20}"} if keys else {}
    with serving(folders, ("a",), idle_s=idle_s, keys=keys) as url:
        body = {"model": "a", "keep_alive": 0}
        assert http.post(f"{url}/api/generate", json=body, headers=headers).status_code == 200
        time.sleep(0.2)
        (model,) = http.get(f"{url}/api/ps", headers=headers).json()["models"]
        assert model["name"] == "a:latest"


def test_a_folder_of_artifacts_is_all_that_is_in_it(folders, tmp_path) -> None:
    found = find_artifacts([folders])
    assert [folder.name for folder in found.artifacts] == ["a", "b", "broken", "c"]
    assert found.on_demand == {"a", "b", "broken", "c"}
    assert find_artifacts([folders / "a"]) == ([folders / "a"], frozenset(), [])
    (tmp_path / "x").mkdir()
    make_served(tmp_path / "y")
    found = find_artifacts([tmp_path])
    assert [folder.name for folder in found.artifacts] == ["y"]
    (reason,) = found.left_out
    assert "x is left out" in reason


def test_a_damaged_artifact_in_a_folder_keeps_no_other_from_being_served(tmp_path) -> None:
    for name in ("a", "b"):
        make_served(tmp_path / name)
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    found = find_artifacts([tmp_path])
    assert ([folder.name for folder in found.artifacts], found.on_demand) == (["b"], {"b"})
    (reason,) = found.left_out
    assert "a is left out" in reason
    assert "tokenizer.json has 1 bytes instead of" in reason
    (tmp_path / "b" / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"no artifact can be used: .*tokenizer\.json has 1 bytes"):
        find_artifacts([tmp_path])


def test_two_names_of_one_folder_are_one_model(folders, tmp_path) -> None:
    make_served(tmp_path / "models" / "v2")
    (tmp_path / "models" / "newest").symlink_to("v2")
    found = find_artifacts([tmp_path / "models"])
    assert (len(found.artifacts), found.on_demand, found.left_out) == (1, {"v2"}, [])
    found = find_artifacts([tmp_path / "models", tmp_path / "models" / "v2"])  # loaded from the start
    assert (found.artifacts, found.on_demand) == ([tmp_path / "models" / "v2"], frozenset())
    with pytest.raises(UsageError, match="a is given twice"):
        open_artifacts([str(folders / "a")] * 2, EngineOptions(batching="off"), ServerLimits())


def test_the_budget_is_kept_to_by_what_the_models_are_given(folders) -> None:
    names = [str(folders / name) for name in NAMES]
    options, limits = EngineOptions(batching="off"), ServerLimits()
    one = min(handler.memory_bytes for handler in open_artifacts(names, options, limits, 10**9))
    for budget in (one, 2 * one, 4 * one):
        handlers = open_artifacts(names, options, limits, budget)
        assert all(handler.memory_bytes <= budget for handler in handlers)
    assert sum(handler.memory_bytes for handler in handlers) <= 4 * one
    with pytest.raises(UsageError, match="loaded models may take 100 MiB"):
        open_artifacts(names, options, limits, 100 * MIB)
    assert plan_residency(names[:1], None, None) == ResidencyOptions()
    assert plan_residency(names, 500, 2) == ResidencyOptions(500 * MIB, 120)
    assert plan_residency(names, None, None).budget_bytes > MIB
    for minutes in (float("nan"), 0.0):
        with pytest.raises(UsageError, match="idle_minutes must be above 0"):
            plan_residency(names, None, minutes)


def test_one_that_is_too_large_is_named_and_the_others_serve(folders, tmp_path) -> None:
    large = make_served(tmp_path / "large", context_length=4000)
    handlers = [open_served(large, LIMITS, cache_bytes=2**30), open_served(folders / "a", LIMITS)]
    options = ResidencyOptions(2 * handlers[1].memory_bytes)
    assert Artifact.find(large).name == "large"
    with background_server(create_app(handlers, LIMITS, worker_module="served_models", residency=options)) as url:
        refused = ask_for(url, "large")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "not_loaded")
        assert "loaded models may take" in error_of(refused)["message"]
        assert states(url) == {"large": "failed", "a": "loaded"}
        assert text_of(ask_for(url, "a")) == "Jeg er a."
