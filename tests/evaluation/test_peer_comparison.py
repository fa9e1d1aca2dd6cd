"""benchmarks/peers: the driver with a scripted stack, and its figures. The libraries are not installed here."""

import itertools
import math
import os
import select
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
SCRIPTED = """
import sys
sys.path.insert(0, {peers!r})
from worker import serve, step_by_step

class Scripted:
    def __init__(self, model, settings):
        print("noise on stdout")
        self.settings, self.prompts = settings, 0

    def describe(self):
        return {{"library": "scripted 1", **self.settings}}

    def generate(self, token_ids, count, trace):
        self.prompts += 1
        if str(self.prompts) == self.settings.get("dies_at"):
            sys.exit("error: out of luck")
        step_by_step(lambda ids: ids[-1] + 1, token_ids, count - int(self.settings.get("short", "0")), trace)

serve(Scripted)
"""


@pytest.fixture(scope="module")
def peers():
    """The modules under test, which import each other as a script's neighbours do."""
    sys.path.insert(0, str(PEERS))
    try:
        import compare
        import process
        import summary
    finally:
        sys.path.remove(str(PEERS))
    return Namespace(compare=compare, process=process, summary=summary)


@pytest.fixture
def scripted(tmp_path):
    script = tmp_path / "run_scripted.py"
    script.write_text(SCRIPTED.format(peers=str(PEERS)))
    return lambda **settings: [sys.executable, str(script), "model", *(f"{k}={v}" for k, v in settings.items())]


MACHINE = {"cpu": "a CPU", "threads": 2, "instruction_sets": ["avx2"], "memory_gb": 24.0}
RUN = {"kind": "run", "shape": "none", "date": "2026-11-25", "revision": "here", "machine": MACHINE}


def run(peers, commands, tmp_path, bandwidths=(20.0,), **given):
    arguments = {"shape": "none", "lengths": [3, 5], "rounds": 2, "decode": 2, "segments": 2, "stop_after": math.inf}
    arguments["most_busy"] = math.inf
    arguments = Namespace(**arguments | {"started": time.monotonic()} | given)
    sizes = {name: {"weight_bytes": 10**9, "cache_bytes": 1e6} for name in commands}
    path, source = tmp_path / "out.jsonl", itertools.cycle(bandwidths)
    with peers.compare.Journal(path) as journal:
        journal.add(RUN)
        peers.compare.run_rounds(commands, sizes, 260, arguments, journal, lambda: next(source))
    records = peers.summary.read_records(path)
    return records, peers.summary.report(records, "first")


def measured(records):
    return [(one["stack"], one["length"], one["round"]) for one in records if one["kind"] == "measurement"]


def test_every_stack_answers_every_prompt_once_in_each_round(peers, scripted, tmp_path):
    records, report = run(peers, {"first": scripted(), "second": scripted(threads="2 | 3")}, tmp_path)
    lines = [line for line in records if line["kind"] == "measurement"]
    assert [(name, length) for name, length, turn in measured(records) if turn == 1] == [
        (name, length) for name in ("first", "second") for length in (3, 5)
    ]
    assert next(name for name, _, turn in measured(records) if turn == 2) == "second"  # another one is first
    prompts = {}
    for one in lines:
        first, *others = one["answer"]
        assert others == [first + i for i in range(1, 5)]  # two segments of two tokens after the prompt's
        assert prompts.setdefault((one["length"], one["round"]), first) == first  # the same prompt for all
        assert one["prefill_s"] > 0
        assert all(segment["decode_s"] > 0 for segment in one["segments"])
        assert one["bandwidth_gb_per_s"] == [20.0] * 3
        assert 1e6 < one["peak_anonymous_bytes"] <= one["peak_resident_bytes"]
        assert one["load_s"] > 0
        assert one["library"] == "scripted 1"
    assert len(set(prompts.values())) > 1
    assert "| second | scripted 1 | 1.000 GB / 1000.0 kB | threads=2 / 3 |" in report  # the table stays a table


def test_a_run_goes_on_where_the_last_one_ended(peers, scripted, tmp_path):
    commands = {"first": scripted(), "second": scripted()}
    records, _ = run(peers, commands, tmp_path, rounds=1)
    once = measured(records)
    assert len(once) == 4
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"kind": "measurement", "stack": "sec')  # killed while it wrote
    records, _ = run(peers, commands, tmp_path, rounds=1)
    assert measured(records) == once
    records, _ = run(peers, commands, tmp_path, rounds=2)
    assert measured(records)[:4] == once
    assert len(set(measured(records))) == len(measured(records)) == 8


def test_what_others_disturbed_does_not_count_and_is_measured_again(peers, scripted, tmp_path):
    records, report = run(peers, {"first": scripted()}, tmp_path, rounds=1, most_busy=-math.inf)
    assert [one["kind"] for one in records[1:]] == ["disturbed"] * 2
    assert "2 measurements with more of it do not count" in report
    records, _ = run(peers, {"first": scripted()}, tmp_path, rounds=1)
    assert measured(records) == [("first", 3, 1), ("first", 5, 1)]


def test_nothing_is_begun_that_would_end_too_late(peers, scripted, tmp_path):
    records, _ = run(peers, {"first": scripted()}, tmp_path, stop_after=10.0)  # loading may take 20 s
    assert measured(records) == []
    records, _ = run(peers, {"first": scripted()}, tmp_path, stop_after=60.0)
    assert len(measured(records)) == 4
    late = [one | {"wall_s": 1000.0, "stack": "second"} for one in records]
    assert not peers.compare.has_time("second", 3, Namespace(started=time.monotonic(), stop_after=900.0), late)


def test_the_time_that_the_bandwidth_takes_is_not_counted(peers, scripted):
    def at_mark():
        time.sleep(0.5)

    with peers.process.Process(scripted()) as process:
        process.ask({"do": "load"})
        answer = process.ask({"do": "decode", "ids": [1, 2], "tokens": 3, "segments": 2}, at_mark)
    assert answer["answer"] == [3, 4, 5, 6, 7, 8, 9]
    assert all(0 < segment["decode_s"] < 0.4 for segment in answer["segments"])


def test_a_figure_counts_only_where_the_memory_kept_its_speed(peers, scripted, tmp_path):
    """Each prompt has three bandwidths: a segment between equal ones, and one between different ones."""
    records, report = run(peers, {"first": scripted()}, tmp_path, [40.0, 41.0, 60.0], lengths=[3])
    row = peers.summary.summarise(records, "first")[3]["first"]
    assert (row["dropped"], row["tried"]) == (2, 4)
    assert row["decode"]["all"]["figures"] == 2
    assert "| 2 of 4 |" in report


@pytest.mark.parametrize("only", [True, False])
def test_a_stack_that_fails_is_reported_and_the_others_go_on(peers, scripted, tmp_path, only):
    commands = {"bad": scripted(dies_at=2)} | ({} if only else {"first": scripted()})
    records, report = run(peers, commands, tmp_path)
    failures = [one for one in records if one["kind"] == "failure"]
    assert [one["stack"] for one in failures] == ["bad"]  # it is not loaded again in this run
    assert "out of luck" in failures[0]["error"]
    assert len(measured(records)) == (0 if only else 4)
    assert "**bad failed in round" in report
    records, _ = run(peers, {"bad": scripted()}, tmp_path, rounds=1)  # the next one tries it again
    assert ("bad", 3, 1) in measured(records)


def test_too_few_tokens_are_an_error_and_no_speed(peers, scripted, tmp_path):
    records, _ = run(peers, {"first": scripted(short=1)}, tmp_path)
    assert "the library gave" in next(one["error"] for one in records if one["kind"] == "failure")
    assert measured(records) == []


def test_a_stack_that_is_killed_while_it_waits_is_an_error_and_no_crash(peers, scripted):
    with peers.process.Process(scripted()) as process:
        process.ask({"do": "load"})
        process._process.kill()
        os.waitid(os.P_PID, process._process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(peers.process.StackError, match="it ended with -9"):
            process.ask({"do": "decode", "ids": [1], "tokens": 1, "segments": 1})


def test_who_waits_is_stopped(peers, scripted):
    with peers.process.Process(scripted()) as process:
        process.ask({"do": "load"})
        fields = Path(f"/proc/{process._process.pid}/stat").read_text().rpartition(")")[2].split()
        assert fields[0] == "T"
        assert process.ask({"do": "decode", "ids": [1, 2], "tokens": 1, "segments": 1})["answer"] == [3, 4]


def test_a_stopped_stack_ends_with_its_driver(scripted):
    program = f"""
import sys
sys.path.insert(0, {str(PEERS)!r})
from process import Process
process = Process({scripted()!r})
process.ask({{"do": "load"}})
print(process._process.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True) as driver:
        stack = os.pidfd_open(int(driver.stdout.readline()))
        driver.kill()
        assert select.select([stack], [], [], 30)[0]  # a pidfd can be read when its process has ended
        os.close(stack)


def test_another_stack_is_first_in_each_repeat(peers):
    turns = [peers.compare.rotated(["a", "b", "c"], turn) for turn in (1, 2, 3, 4)]
    assert turns == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_a_ratio_is_that_of_medians_and_keeps_repeats_together(peers):
    ours, theirs = [10.0, 20.0, 40.0, 30.0, 12.0], [5.0, 10.0, 20.0, 15.0, 6.0]
    assert peers.summary.ratio_interval(ours, theirs) == (2.0, 2.0, 2.0)  # what slows one down slows both
    ratio, low, high = peers.summary.ratio_interval([10.0, 11.0, 9.0, 10.0, 10.5], [10.0, 9.5, 10.5, 10.0, 9.0])
    assert low < ratio < high
    assert ratio == 1.0


def made_up(stack, turn, bandwidth, decode_s, prefill_s=1.5):
    segments = [{"decode_s": decode_s, "decode_cpu_s": 1.5 * decode_s}]
    record = {"kind": "measurement", "stack": stack, "length": 100, "round": turn, "decode_tokens": 20, "busy": 0.0}
    record |= {"segments": segments, "bandwidth_gb_per_s": [bandwidth] * 2, "weight_bytes": 10**9, "cache_bytes": 1e6}
    record |= {"prefill_s": prefill_s, "prefill_cpu_s": 3.0, "load_s": 1.0, "cold_first_token_s": 1.0}
    return record | {"peak_resident_bytes": 1, "peak_anonymous_bytes": 1, "library": "a library", "settings": {}}


def test_bandwidth_share_is_bytes_read_by_bandwidth(peers):
    row = peers.summary.summarise([made_up("first", 1, 22.2, 2.0)], "first")[100]["first"]
    assert row["prefill"] == pytest.approx(100 / 1.5)
    decode = row["decode"]["all"]
    assert decode["tokens_per_s"] == pytest.approx(10.0)
    assert decode["share"] == pytest.approx(0.5)  # 1 GB of weights, 1 MB for each of 110 tokens; ten times a second
    assert row["decode_cores"] == pytest.approx(1.5)
    assert row["prefill_cores"] == pytest.approx(2.0)


def test_decoding_is_compared_within_a_phase_of_the_memory(peers):
    """The first stack met the fast memory more often; it is a tenth faster in both phases, and no more."""
    records = [made_up("first", turn, 66.0, 1.0) for turn in (1, 2, 3)] + [made_up("first", 4, 37.0, 2.0)]
    records += [made_up("other", turn, 37.0, 2.2) for turn in (1, 2, 3)] + [made_up("other", 4, 66.0, 1.1)]
    decode = peers.summary.summarise(records, "first")[100]["other"]["decode"]
    assert decode["slow"]["ratio"] == pytest.approx((1.1, 1.1, 1.1))
    assert decode["fast"]["ratio"] == pytest.approx((1.1, 1.1, 1.1))
    assert (decode["slow"]["rounds"], decode["fast"]["rounds"]) == (3, 1)
    assert "slow and fast phase parted at" in peers.summary.report([RUN, *records], "first")


@pytest.mark.parametrize(
    ("bandwidths", "limit"),
    [
        ([37, 38, 66, 36, 64, 65, 66], math.sqrt(38 * 64)),
        ([60, 61, 63, 59, 66], None),
        ([50], None),
        ([], None),
    ],
)
def test_phases_are_told_apart_where_there_are_two(peers, bandwidths, limit):
    assert peers.summary.split_phases(bandwidths) == (limit if limit is None else pytest.approx(limit))


def test_rounds_with_more_figures_do_not_narrow_an_interval_beyond_its_rounds(peers):
    ours = [{"round": turn, "x": speed} for turn, speed in ((1, 10.0), (1, 10.0), (2, 12.0), (2, 12.0), (3, 11.0))]
    theirs = [{"round": turn, "x": 5.0} for turn in (1, 2)]
    ratio, low, high = peers.summary.pooled_ratio(ours, theirs, "x")
    assert (low, ratio, high) == pytest.approx((2.0, 2.2, 2.4))


def test_prompts_are_new_in_each_round_and_fit_the_vocabulary(peers):
    prompts = [peers.compare.make_prompt(260, 512, turn) for turn in range(6)]
    assert len({tuple(prompt) for prompt in prompts}) == 6
    assert prompts[1] == peers.compare.make_prompt(260, 512, 1)
    assert all(0 <= token < 260 for prompt in prompts for token in prompt)


def test_a_run_without_its_folders_is_refused_with_what_is_missing():
    done = subprocess.run(
        [sys.executable, PEERS / "compare.py", "--shape", "tiny"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--environments, --models, --measurements" in done.stderr
