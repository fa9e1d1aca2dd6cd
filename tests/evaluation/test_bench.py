"""`normistral bench`: what is compared, in which turns, in processes that may fail, and the command as it is."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from sample_artifacts import make_manifest, write_artifact

from normistral.artifact.manifest import FileRecord, RecipeRecord
from normistral.cli import main
from normistral.errors import EngineError, ModelNotFoundError, ResourceError, UsageError
from normistral.evaluation.bench import runner
from normistral.evaluation.bench.configuration import (
    Configuration,
    Samples,
    count_threads,
    read_configurations,
    split_settings,
)
from normistral.evaluation.bench.machine import Bandwidth, ProcessMemory, read_process_memory
from normistral.evaluation.bench.results import Spread
from normistral.evaluation.bench.runner import choose_interleaving, run_benchmark
from normistral.evaluation.bench.speed import ConversationPass, Pass, SpeedPlan
from normistral.evaluation.bench.worker import Account, Measurer, ModelLoaded, Worker
from normistral.runtime.engines.settings import EngineConfig

PLAN = SpeedPlan(
    prefill_lengths=(8,), decode_contexts=(4,), decode_tokens=2, question_tokens=6, answer_tokens=2,
    follow_up_tokens=3, repeats=2, warm_ups=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))


@pytest.fixture
def small_buffer(monkeypatch):
    """So that measuring the bandwidth takes no time; whether its figure is right is tested elsewhere."""
    monkeypatch.setattr(runner, "choose_buffer_bytes", lambda cache, available: 2**20)


def configurations(*names, **changes):
    return [Configuration(name, Path(name), make_manifest(**changes)) for name in names]


# What is compared


def test_an_artifact_may_bring_settings():
    assert split_settings("a/b@x=1, y=2") == ("a/b", {"x": "1", "y": "2"})
    assert split_settings("me@home") == ("me@home", {})
    for wrong in ("a@x=", "a@x=1,", "a@x=1,x=2"):
        with pytest.raises(UsageError, match="setting"):
            split_settings(wrong)


def test_configurations_have_their_own_settings_over_the_shared_ones(tmp_path):
    write_artifact(tmp_path / "sju")
    name = str(tmp_path / "sju")
    first, second = read_configurations([name, f"{name}@A=2"], EngineConfig("CPU", True, {"A": "1", "B": "3"}))
    assert (first.label, dict(first.engine.settings)) == ("sju", {"A": "1", "B": "3"})
    assert (second.label, dict(second.engine.settings)) == ("sju@A=2", {"A": "2", "B": "3"})
    assert first.engine.exact


def test_the_same_twice_is_refused_and_the_same_name_is_told_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_artifact(tmp_path / folder / "sju")
    names = [str(tmp_path / folder / "sju") for folder in ("x", "y")]
    assert [one.label for one in read_configurations(names, EngineConfig())] == names
    for twice in ([names[0], names[0]], [names[0], f"{names[0]}@A=1"]):
        with pytest.raises(UsageError, match="twice"):
            read_configurations(twice, EngineConfig(settings={"A": "1"}))
    with pytest.raises(ModelNotFoundError):
        read_configurations(["nowhere"], EngineConfig())


def test_threads_are_those_of_the_settings():
    assert count_threads({}, 8) == count_threads({"intra_op_num_threads": "0"}, 8) == 8
    for name in ("INFERENCE_NUM_THREADS", "intra_op_num_threads"):
        assert count_threads({name: "3"}, 8) == 3


@pytest.mark.parametrize(
    ("format", "tied", "recipe", "unread"),
    [
        ("openvino", True, RecipeRecord("int4", backup="int8_asym"), 0),
        ("openvino", False, RecipeRecord("int4", backup="int8_asym"), 320 * 64),
        ("openvino", False, RecipeRecord("int4", backup="fp"), 320 * 64 * 2),
        ("onnx", False, RecipeRecord("int4", backup="fp"), 320 * 64 * 4),
        ("openvino", False, RecipeRecord("fp16"), 320 * 64 * 2),
        ("onnx", False, RecipeRecord("fp32"), 320 * 64 * 4),
    ],
)
def test_a_token_reads_all_weights_but_an_untied_embedding(format, tied, recipe, unread):
    architecture = make_manifest().architecture
    changed = dataclasses.replace(architecture, tied_embeddings=tied)
    data, graph = {"openvino": ("openvino_model.bin", "openvino_model.xml"), "onnx": ("model.onnx.data", "model.onnx")}[
        format
    ]
    files = {data: FileRecord(1_000_000, "a" * 64), graph: FileRecord(1_000, "a" * 64)}
    files["openvino_tokenizer.bin"] = FileRecord(7_000, "a" * 64)
    manifest = make_manifest(format=format, architecture=changed, recipe=recipe, files=files)
    assert Configuration("a", Path("a"), manifest).weight_bytes_per_token == 1_001_000 - unread


# Memory


def test_models_share_the_memory_where_they_fit():
    files = {"openvino_model.bin": FileRecord(4 * 10**9, "a" * 64)}
    one, two = configurations("a", "b", files=files)
    assert choose_interleaving([one, two], PLAN, 20 * 10**9) == "together"
    assert choose_interleaving([one, two], PLAN, 16 * 10**9) == "reloaded"
    assert choose_interleaving([one], PLAN, 5 * 10**9) == "together"  # alone it need not share
    with pytest.raises(ResourceError, match=r"a needs at least 4\.0 GB of memory; 3\.0 GB are available"):
        choose_interleaving([one, two], PLAN, 3 * 10**9)


# Turns


class FakeWorker:
    """Answers without a process, and writes down who was asked what."""

    asked: list  # (name, method or "start" or "close", arguments)
    settings: dict  # name -> in force once it is loaded, over what was given
    fails_at: dict  # name -> (method, how many of its calls go well)

    def __init__(self, name, environment=None):
        self.name, self.started = name, time.perf_counter()
        self.asked.append((name, "start", ()))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self.asked.append((self.name, "close", ()))

    def ask(self, method, *arguments):
        self.asked.append((self.name, method, arguments))
        failing, well = self.fails_at.get(self.name, (None, 0))
        if method is failing:
            self.fails_at[self.name] = (failing, well - 1)
            if well == 0:
                raise EngineError(f"{self.name}: it broke", "mend it")
        seen = sum((name, other) == (self.name, method) for name, other, _ in self.asked)
        return {
            Measurer.load: lambda: ModelLoaded(
                0.1, 0.2, "scripted", "rule", self.settings.get(self.name, {}), 2.0, None
            ),
            Measurer.first_token: lambda: 1.0,
            Measurer.conversation: lambda: ConversationPass(0.5, 0.25, 7),
            Measurer.fingerprint: lambda: "f" * 64,
            Measurer.account: lambda: Account(ProcessMemory(9, 8, 7, 6), 7, 0.5, 1.0),
            Measurer.read_bandwidth: lambda: Bandwidth(arguments[0], 2**20, 10.0 + seen, "k", {"k": 10.0 + seen}),
            Measurer.one_pass: lambda: Pass(8, 1.0 / seen, 2, 2.0 / seen),
        }[method]()


@pytest.fixture
def fake(monkeypatch):
    FakeWorker.asked, FakeWorker.settings, FakeWorker.fails_at = [], {}, {}
    monkeypatch.setattr(runner, "Worker", FakeWorker)
    return FakeWorker


def passes(fake):
    return [(name, arguments[0]) for name, method, arguments in fake.asked if method is Measurer.one_pass]


def bytes_read(one):
    """By a token that PLAN decodes: weights, and five tokens of KV cache in float32."""
    return one.weight_bytes_per_token + 5 * 4 * make_manifest().architecture.kv_values_per_token


def test_models_in_memory_take_turns_at_every_measurement(fake):
    result = run_benchmark(configurations("a", "b", "c"), PLAN)
    assert result.interleaving == "together"
    assert passes(fake) == [
        *[(name, length) for length in (4, 8) for name in "cab"],  # warm-up
        *[(name, length) for length in (4, 8) for name in "abc"],
        *[(name, length) for length in (4, 8) for name in "bca"],
    ]
    place = {Measurer.first_token: 1, Measurer.conversation: 1, Measurer.one_pass: 2}
    seeds = [arguments[place[method]] for _, method, arguments in fake.asked if method in place]
    assert len(set(seeds)) == len(seeds)  # no prompt comes twice: the cache knows none
    assert [method for name, method, _ in fake.asked if name == "a" and isinstance(method, str)] == ["start", "close"]


def test_the_bandwidth_is_measured_first_and_before_each_round(fake):
    result = run_benchmark(configurations("a"), PLAN)
    names = [name for name, method, _ in fake.asked if method == "start"]
    assert names == ["the read bandwidth", "a", "the read bandwidth", "the read bandwidth"]
    (bandwidth,) = result.bandwidth
    assert (bandwidth.best.gb_per_s, bandwidth.gb_per_s.n) == (13.0, 3)
    (one,) = result.configurations
    speed = one.figures.decode[0]
    assert speed.share == pytest.approx(speed.tokens_per_s.median * bytes_read(one) / 13e9)


def test_decoding_is_judged_by_the_bandwidth_around_it():
    """Three at 20 GB/s, of which one met a change; weights and 9 tokens of KV cache in 8 bits are read."""
    (configuration,) = configurations("a")
    samples = Samples(configuration)
    samples.loads.append((1.0, ModelLoaded(0.1, 0.2, "scripted", "rule", {"KV_CACHE_PRECISION": "u8"}, 2.0, None)))
    samples.passes[8] = [
        Pass(8, 1.0, 2, 0.1, bandwidth_gb_per_s=(20.0, 20.0)),
        Pass(8, 1.0, 2, 0.05, bandwidth_gb_per_s=(20.0, 35.0), dropped=2),
        Pass(8, 1.0, 2, 0.1, bandwidth_gb_per_s=(20.5, 19.5)),
    ]
    decode = samples._decode(8, 99.0)
    assert decode.tokens_per_s == Spread(20.0, 20.0, 20.0, 2)
    assert (decode.dropped, decode.bandwidth_gb_per_s.median) == (3, 20.0)
    read = configuration.weight_bytes_per_token + 9 * configuration.manifest.architecture.kv_values_per_token
    assert decode.share == pytest.approx(20.0 * read / 20e9)


def test_each_number_of_threads_has_a_ceiling_of_its_own(fake):
    three = Configuration("b", Path("b"), make_manifest(), EngineConfig(settings={"INFERENCE_NUM_THREADS": "3"}))
    run_benchmark([*configurations("a"), three], PLAN)
    threads = {arguments[0] for _, method, arguments in fake.asked if method is Measurer.read_bandwidth}
    assert 3 in threads
    assert len(threads) == 2


@pytest.mark.parametrize("available", [10**12, 10**9])
def test_settings_that_were_tuned_earlier_count_once_they_are_known(fake, monkeypatch, available):
    monkeypatch.setattr(runner, "available_memory_bytes", lambda: available)
    fake.settings["b"] = {"INFERENCE_NUM_THREADS": "3"}
    plan = dataclasses.replace(PLAN, repeats=1)
    result = run_benchmark(configurations("a", "b"), plan)
    tuned = result.configurations[1].figures
    assert tuned.threads == 3
    ceiling = next(found.best.gb_per_s for found in result.bandwidth if found.threads == 3)
    read = bytes_read(result.configurations[1])
    assert tuned.decode[0].share == pytest.approx(tuned.decode[0].tokens_per_s.median * read / 1e9 / ceiling)


def test_warm_ups_do_not_count_and_medians_are_of_the_rest(fake):
    (one,) = run_benchmark(configurations("a"), PLAN).configurations
    figures = one.figures
    # The passes of length 4 are numbers 1 (warm-up), 3 and 5; of length 8: 2 (warm-up), 4 and 6.
    assert figures.decode[0].tokens_per_s == Spread.of([3.0, 5.0])
    assert figures.prefill[0].tokens_per_s == Spread.of([32.0, 48.0])
    assert figures.answers.question_s.n == 2
    assert figures.idle_cpu_share == 0.5
    assert figures.memory.peak == 9


def test_models_that_do_not_fit_are_loaded_in_turns(fake, monkeypatch):
    monkeypatch.setattr(runner, "available_memory_bytes", lambda: 10**9)
    result = run_benchmark(configurations("a", "b"), PLAN)
    assert result.interleaving == "reloaded"
    starts = [(name, method) for name, method, _ in fake.asked if isinstance(method, str) and "band" not in name]
    assert starts == [(name, what) for name in "abba" for what in ("start", "close")]
    assert result.configurations[0].figures.load.ready_s.n == 2
    assert result.configurations[0].figures.decode[0].tokens_per_s.n == 2


@pytest.mark.parametrize("available", [10**12, 10**9])
@pytest.mark.parametrize("method", [Measurer.load, Measurer.one_pass, Measurer.fingerprint])
def test_one_that_fails_is_left_out_and_the_others_go_on(fake, monkeypatch, method, available):
    monkeypatch.setattr(runner, "available_memory_bytes", lambda: available)
    fake.fails_at["b"] = (method, 0)
    first, second, third = run_benchmark(configurations("a", "b", "c"), PLAN).configurations
    assert second.figures is None
    assert second.problem == "b: it broke (mend it)"
    assert first.figures.decode[0].tokens_per_s.n == third.figures.decode[0].tokens_per_s.n == 2
    after = fake.asked[fake.asked.index(("b", "close", ())) :]
    assert all(method == "close" for name, method, _ in after if name == "b")


@pytest.mark.parametrize(("available", "count"), [(10**12, 18), (10**9, 24)])
def test_progress_counts_every_measurement(fake, monkeypatch, available, count):
    monkeypatch.setattr(runner, "available_memory_bytes", lambda: available)
    progress = MagicMock()
    run_benchmark(configurations("a", "b"), PLAN, progress)
    progress.stage.assert_called_once_with("measuring", count, "measurements")
    advanced = progress.stage.return_value.__enter__.return_value.advance
    assert [call.args for call in advanced.call_args_list] == [(1,)] * count
    assert len(passes(fake)) == count * 2 // 3
    notes = [call.args[0] for call in progress.note.call_args_list]
    assert any("do not fit" in note for note in notes) == (available == 10**9)
    assert any("memory is read at" in note for note in notes)


# Processes


def scripted(name):
    return Worker(name, module="scripted_worker")


def load(worker):
    return worker.ask(Measurer.load, Path(worker.name), "openvino", EngineConfig())


def test_a_worker_answers_what_it_is_asked():
    with scripted("a") as worker:
        assert load(worker).engine == "scripted"
        assert worker.ask(Measurer.first_token, 6, 1) > 0
        measured = worker.ask(Measurer.one_pass, 8, 2, 2)
        assert (measured.prefill_tokens, measured.decode_tokens) == (8, 2)
        around = worker.ask(Measurer.one_pass, 8, 2, 5, meter=(1, 2**20))
        assert min(around.bandwidth_gb_per_s) > 0
        assert measured.bandwidth_gb_per_s is None
        assert worker.ask(Measurer.conversation, PLAN, 3).cached_tokens == 7
        assert len(worker.ask(Measurer.fingerprint)) == 64
        with pytest.raises(EngineError, match="a: the prompt takes 1000 tokens"):
            worker.ask(Measurer.one_pass, 1000, 2, 4)
        account = worker.ask(Measurer.account)  # it went on after the error
        assert account.idle_s > 0
        process = worker._process
    assert process.returncode is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refuses", "refuses: it would not"),
        ("killed", "killed: its process was killed, most likely because the memory was used up"),
        ("crashes", r"crashes: its process crashed \(SIGILL\)"),
        ("breaks", "breaks: its process ended: RuntimeError: a bug"),
    ],
)
def test_a_process_that_goes_wrong_is_an_error(name, message):
    with scripted(name) as worker, pytest.raises(EngineError, match=message):
        load(worker)


def test_a_worker_ends_with_the_process_that_asks():
    with scripted("a") as worker:
        worker._process.stdin.close()
        assert worker._process.wait(timeout=30) == 0


def test_memory_of_a_process_is_read_from_proc(tmp_path):
    folder = tmp_path / "proc/self"
    folder.mkdir(parents=True)
    (folder / "status").write_text("Name:\tx\nVmHWM:\t    30 kB\nVmRSS:\t 20 kB\nRssAnon:\t 10 kB\nThreads:\t3\n")
    (folder / "smaps_rollup").write_text("00-ff ---p 0 0 0 [rollup]\nRss: 20 kB\nPss:  15 kB\n")
    assert read_process_memory(tmp_path) == ProcessMemory(30 * 1024, 20 * 1024, 10 * 1024, 15 * 1024)


# The command

# One thread: two of them wait for each other longer than they compute here.
BRIEF = ["--set", "intra_op_num_threads=1", "--tokens", "4"]


def test_the_command_measures_and_reports(tiny_onnx, tmp_path, capsys, small_buffer):
    artifact = tiny_onnx("onnx-int4")
    page, figures = tmp_path / "fart.html", tmp_path / "fart.json"
    arguments = ["bench", str(artifact), f"{artifact}@session.intra_op.allow_spinning=0", *BRIEF, "--repeats", "2"]
    assert main([*arguments, "--report", str(page), "--json", str(figures)]) == 0
    printed = capsys.readouterr()
    document = json.loads(figures.read_text(encoding="utf-8"))
    first, second = document["configurations"]
    assert second["label"] == f"{artifact.name}@session.intra_op.allow_spinning=0"
    assert first["figures"]["threads"] == 1
    assert second["figures"]["settings"]["session.intra_op.allow_spinning"] == "0"
    assert first["figures"]["output_sha256"] == second["figures"]["output_sha256"]
    assert document["plan"]["prefill_lengths"] == [63]  # cut to the context of 64
    for one in (first, second):
        decode = one["figures"]["decode"][0]
        assert decode["tokens_per_s"]["n"] == 2 or decode["dropped"]  # a busy machine changes its bandwidth
        assert one["figures"]["memory"]["peak"] > 10**7
    assert f"{second['label']}: It writes" in printed.out
    assert page.read_text(encoding="utf-8").count("<svg") == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fart.html", "fart.json"]


def test_what_failed_ends_in_an_error_after_the_others_were_reported(tiny_onnx, tmp_path, capsys, small_buffer):
    artifact = tiny_onnx("onnx-int4")
    report = tmp_path / "fart.md"
    arguments = [str(artifact), f"{artifact}@no_such_setting=1", *BRIEF, "--repeats", "1", "--report", str(report)]
    assert main(["bench", *arguments]) == 1
    printed = capsys.readouterr()
    assert f"{artifact.name}: It writes" in printed.out
    assert "error: 1 of 2 could not be measured" in printed.err
    assert "no_such_setting" in printed.err.partition("error:")[2]
    assert "could not be measured" in report.read_text(encoding="utf-8")


def test_where_nothing_could_be_measured_nothing_is_reported(fake, tmp_path, capsys):
    write_artifact(tmp_path / "sju")
    fake.fails_at["sju"] = (Measurer.load, 0)
    report = tmp_path / "fart.md"
    assert main(["bench", str(tmp_path / "sju"), "--report", str(report)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "error: nothing could be measured: sju: it broke (mend it)\n" in printed.err
    assert not report.exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--report", "fart.pdf"], 2, "unknown kind of report"),
        (["--report", "no/such/fart.html"], 2, "there is no folder"),
        (["--report", "a.md", "--json", "a.md"], 2, "both name a.md"),
        (["--json", "no/such/fart.json"], 2, "there is no folder"),
        (["--prefill", "12,x"], 2, "not a list of whole numbers"),
        (["--prefill", "1" * 5000], 2, "not a list of whole numbers"),
        (["--decode", "0"], 2, "rising whole numbers from 1"),
        (["--tokens", "0"], 2, "has to be 1 or more"),
        (["--repeats", "0"], 2, "has to be 1 or more"),
        (["--prefill", "100000"], 1, "has room for 128"),
        (["--decode", "127"], 1, "has room for 128"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch, options, code, message):
    write_artifact(tmp_path / "sju")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "Worker", None)
    assert main(["bench", "sju", *options]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "hint:" in error
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_ctrl_c_ends_the_workers_and_leaves_no_report(tiny_onnx, tmp_path):
    command = [sys.executable, "-m", "normistral.cli", "bench", str(tiny_onnx("onnx-int4")), "--repeats", "100000"]
    process = subprocess.Popen(
        [*command, *BRIEF, "--report", str(tmp_path / "fart.html")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    try:
        process.stderr.readline()  # it measures
        deadline = time.monotonic() + 60
        while not (workers := children(process.pid)) and time.monotonic() < deadline:
            os.sched_yield()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130, error
        assert workers
        # One that was just being started is not known yet: it ends when it finds its stdin closed.
        while any(map(is_alive, workers)) and time.monotonic() < deadline:
            os.sched_yield()
        assert not any(map(is_alive, workers))
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()
