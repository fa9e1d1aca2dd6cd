"""`lm_eval --model normistral` beside the harness's own `hf` model: same tasks, same weights, same scores.

Needs lm_eval, which the ordinary environment does not have; `make test-lm-eval` runs it in one of its own. Both sides
are the harness's command line, and what they logged for each request is compared.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import QUIRKS, edit_json, make_mistral

from normistral.errors import UsageError

ROOT = Path(__file__).parents[2]
TASKS = ("norsk_choices", "norsk_completion", "norsk_perplexity")
# Nats. `hf` adds up the tokens of a window in float32, which keeps 24 bits: -2569.60321 comes in steps of 0.00024.
TOLERANCE = {"abs": 1e-4, "rel": 1e-7}
# Shorter than some requests (one token a byte), so that truncation and windows are compared too.
SHAPE = QUIRKS | {"positions": 128}
CASES = {
    "chat model without BOS": ({"chat": True}, []),
    "base model with BOS": ({"chat": False, "adds_bos": True}, []),
    "chat template": ({"chat": True}, ["--apply_chat_template"]),
}


def run_harness(model: str, arguments: str, output: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "normistral.evaluation.lm_eval", "--model", model, "--model_args", arguments]
    command += ["--tasks", ",".join(TASKS), "--include_path", "tests/lm_eval_tasks", "--output_path", str(output)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(output.parent / "home")}
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, "--log_samples", *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def read_run(output: Path) -> tuple[dict, dict]:
    """Metrics of each task, and its samples by number."""
    (results,) = output.rglob("results_*.json")
    samples = {}
    for task in TASKS:
        (path,) = output.rglob(f"samples_{task}_*.jsonl")
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        samples[task] = {line["doc_id"]: line for line in lines}
    return json.loads(results.read_text(encoding="utf-8")), samples


@pytest.fixture(scope="module", params=CASES)
def runs(request, tmp_path_factory):
    """(ours, the harness's hf): what each wrote."""
    from normistral import export_model

    options, flags = CASES[request.param]
    folder = tmp_path_factory.mktemp("lm-eval")
    checkpoint = make_mistral(folder / "checkpoint", **SHAPE, **options)
    export_model(str(checkpoint), folder / "artifact", format="onnx", weights="fp32")
    # transformers puts this above the task's limit, and `hf` then generates 1,024 tokens for a task that wants 12.
    edit_json(checkpoint / "generation_config.json", max_new_tokens=...)
    ours = run_harness("normistral", f"artifact={folder / 'artifact'},exact=true", folder / "ours", *flags)
    assert ours.returncode == 0, ours.stderr
    theirs = run_harness("hf", f"pretrained={checkpoint},dtype=float32", folder / "hf", "--device", "cpu", *flags)
    assert theirs.returncode == 0, theirs.stderr
    return read_run(folder / "ours"), read_run(folder / "hf"), ours, theirs


def test_the_metrics_are_the_same(runs):
    (ours, _), (theirs, _), *_ = runs
    assert ours["results"].keys() == theirs["results"].keys() == set(TASKS)
    for task in TASKS:
        expected = {k: v for k, v in theirs["results"][task].items() if isinstance(v, float)}
        assert expected
        assert {k: v for k, v in ours["results"][task].items() if k in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("task", "count"), [("norsk_choices", 12), ("norsk_perplexity", 4)])
def test_every_log_likelihood_is_the_same(runs, task, count):
    (_, ours), (_, theirs), *_ = runs
    assert len(theirs[task]) == count
    for number, expected in theirs[task].items():
        sample = ours[task][number]
        assert sample["arguments"] == expected["arguments"]
        for (ours_first, *ours_rest), (first, *rest) in zip(sample["resps"], expected["resps"], strict=True):
            value, wanted = (ours_first[0], first[0]) if isinstance(first, list) else (ours_first, first)
            assert float(value) == pytest.approx(float(wanted), **TOLERANCE)
            assert float(wanted) < 0
            if isinstance(first, list):
                assert ours_first[1] == first[1]  # whether greedy decoding would write it
            assert ours_rest == rest


def test_every_generated_text_is_the_same(runs):
    (_, ours), (_, theirs), *_ = runs
    answers = {number: sample["resps"] for number, sample in ours["norsk_completion"].items()}
    assert answers == {number: sample["resps"] for number, sample in theirs["norsk_completion"].items()}
    assert len(answers) == 6
    assert any(text for ((text,),) in answers.values())


def test_both_say_that_they_cut_a_request(runs):
    *_, ours, theirs = runs
    assert "was cut from the left" in ours.stderr + ours.stdout
    assert "runcati" in theirs.stderr + theirs.stdout


def test_the_results_say_what_ran(runs):
    (ours, _), *_ = runs
    assert ours["config"]["model_dtype"] == "fp32"
    assert ours["config"]["model_format"] == "onnx"


def test_an_error_is_two_lines_and_an_exit_code(tmp_path):
    done = run_harness("normistral", "artifact=nowhere-at-all", tmp_path / "output")
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: ")
    assert "nowhere-at-all" in error
    assert hint.startswith("hint: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ("exact=true", {}, "no artifact was given"),
        ("artifact=nowhere-at-all,quantised=true", {}, "unknown argument quantised"),
        ("artifact=nowhere-at-all,exact=1", {}, "exact must be true or false, not 1"),
        ("artifact=nowhere-at-all", {"batch_size": 8}, "requests are answered one at a time"),
        ("artifact=nowhere-at-all", {"device": "cpu"}, "--device cpu is not for this model"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, options, said):
    from normistral.evaluation.lm_eval_model import NormistralLM

    # What the harness hands over when nobody gives these options.
    given = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"} | options
    with pytest.raises(UsageError, match=said) as caught:
        NormistralLM.create_from_arg_string(arguments, given)
    assert caught.value.hint
