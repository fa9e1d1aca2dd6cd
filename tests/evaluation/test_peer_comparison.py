"""benchmarks/peers: the driver with a scripted stack, and its figures. The libraries are not installed here."""

import json
import os
import select
import subprocess
import sys
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
        import stacks
        import summary
    finally:
        sys.path.remove(str(PEERS))
    process.COOL_DOWN_S = 0.0
    return Namespace(compare=compare, process=process, stacks=stacks, summary=summary)


@pytest.fixture
def scripted(tmp_path):
    script = tmp_path / "run_scripted.py"
    script.write_text(SCRIPTED.format(peers=str(PEERS)))
    return lambda **settings: [sys.executable, str(script), "model", *(f"{k}={v}" for k, v in settings.items())]


def run(peers, commands, tmp_path, resident, repeats=2):
    row = {"bytes_per_token": 10**9, "peak_resident_bytes": 0, "peak_anonymous_bytes": 0}
    lists = ("measurements", "ready_s", "load_s", "cold_first_token_s")
    document = {
        "shape": "none",
        "date": "2026-11-25",
        "revision": "here",
        "reference": "first",
        "prompt_tokens": 3,
        "decode_tokens": 2,
        "repeats": repeats,
        "machine": {"cpu": "a CPU", "threads": 2, "instruction_sets": ["avx2"], "memory_gb": 24.0},
        "bandwidth": {"gb_per_s": 20.0, "kernel": "scripted"},
        "stacks": {name: row | {key: [] for key in lists} | {"resident": name in resident} for name in commands},
    }
    arguments = Namespace(prompt=3, decode=2, json=tmp_path / "out.json", report=tmp_path / "out.md")
    prompts = [[10 * n, 10 * n + 1, 10 * n + 2] for n in range(repeats + 1)]
    peers.compare.run_repeats(commands, prompts, document, arguments)
    return json.loads(arguments.json.read_text()), arguments.report.read_text()


def test_every_stack_answers_every_prompt_once_in_each_repeat(peers, scripted, tmp_path):
    commands = {"first": scripted(), "apart": scripted(threads="2 | 3")}
    document, report = run(peers, commands, tmp_path, {"first"})
    for name, loads in (("first", 1), ("apart", 2)):
        stack = document["stacks"][name]
        # the prompt's last id and on: N tokens after the first new one; the warm-up's prompt is not among them
        assert [one["answer"] for one in stack["measurements"]] == [[13, 14, 15], [23, 24, 25]]
        assert all(one["prefill_s"] > 0 and one["decode_s"] > 0 for one in stack["measurements"])
        assert len(stack["load_s"]) == len(stack["cold_first_token_s"]) == loads
        assert 1e6 < stack["peak_anonymous_bytes"] <= stack["peak_resident_bytes"]
        assert stack["library"] == "scripted 1"
    assert document["stacks"]["apart"]["settings"] == {"threads": "2 | 3"}
    assert "| apart * |" in report
    assert "| apart | scripted 1 | threads=2 / 3 |" in report  # the table stays a table


@pytest.mark.parametrize("resident", [True, False])
def test_a_stack_that_fails_is_reported_and_the_others_go_on(peers, scripted, tmp_path, resident):
    commands = {"bad": scripted(dies_at=2), "first": scripted()}
    document, report = run(peers, commands, tmp_path, {"first", "bad"} if resident else {"first"})
    assert "out of luck" in document["stacks"]["bad"]["error"]
    assert len(document["stacks"]["first"]["measurements"]) == 2
    assert "**bad failed:**" in report
    assert "out of luck" in report


def test_too_few_tokens_are_an_error_and_no_speed(peers, scripted, tmp_path):
    document, _ = run(peers, {"first": scripted(short=1)}, tmp_path, {"first"})
    assert "the library gave" in document["stacks"]["first"]["error"]
    assert document["stacks"]["first"]["measurements"] == []


def test_a_stack_that_is_killed_while_it_waits_is_an_error_and_no_crash(peers, scripted):
    with peers.process.Process(scripted()) as process:
        process.ask({"do": "load"})
        process._process.kill()
        os.waitid(os.P_PID, process._process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(peers.process.StackError, match="it ended with -9"):
            process.ask({"do": "prefill", "ids": [1]})


def test_who_waits_is_stopped(peers, scripted):
    with peers.process.Process(scripted()) as process:
        process.ask({"do": "load"})
        fields = Path(f"/proc/{process._process.pid}/stat").read_text().rpartition(")")[2].split()
        assert fields[0] == "T"
        assert process.ask({"do": "prefill", "ids": [1, 2]})["answer"] == [3]


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


def test_bandwidth_share_is_bytes_read_by_bandwidth(peers, scripted, tmp_path):
    document, _ = run(peers, {"first": scripted()}, tmp_path, {"first"})
    document["stacks"]["first"]["measurements"] = [
        {"prefill_s": 1.5, "decode_s": 0.2, "prefill_cpu_s": 3.0, "decode_cpu_s": 0.3, "busy": 0.0}
    ]
    row = peers.summary.summarise(document)["first"]
    assert row["prefill"] == 2.0  # 3 tokens in 1.5 s
    assert row["decode"] == pytest.approx(10.0)
    assert row["gb_per_s"] == pytest.approx(10.0)  # 1 GB a token
    assert row["bandwidth_share"] == pytest.approx(0.5)  # of 20
    assert row["decode_cores"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("available", "resident"),
    [
        (17, {"small", "middle", "large"}),
        (16, {"small"}),  # 1 + 7 + 9 is too much; 1 + 9, one after the other, is not
        (10, {"small"}),
        (9, set()),
    ],
)
def test_the_smallest_stay_loaded_as_long_as_the_largest_other_fits_beside_them(peers, available, resident):
    likely = {"large": 9, "small": 1, "middle": 7}
    assert peers.stacks.choose_resident(likely, available) == resident


def test_no_prompt_comes_twice_and_all_fit_the_vocabulary(peers):
    prompts = peers.compare.make_prompts(260, 6, 512)
    assert len({tuple(prompt) for prompt in prompts}) == 6
    assert all(0 <= token < 260 for prompt in prompts for token in prompt)


def test_a_run_without_its_folders_is_refused_with_what_is_missing():
    done = subprocess.run(
        [sys.executable, PEERS / "compare.py", "--shape", "tiny"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--environments, --models, --json, --report" in done.stderr
