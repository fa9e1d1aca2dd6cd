"""Many answers at once on openvino_genai: what comes out is what the library gives, however many are under way."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import httpx
import numpy as np
import pytest
from tiny_bloom import make_bloom
from tiny_models import END_THINK, THINK, make_llama, make_mistral

import normistral
from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import read_manifest
from normistral.errors import ClosedError, EngineError, NormistralError, UsageError
from normistral.runtime.chunks import Completion
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.options import GenerationConfig
from normistral.runtime.structured.structure import Structure
from normistral.server.app import create_app
from normistral.server.auth import Keys
from normistral.server.backends.base import Job
from normistral.server.backends.create import create_backend
from normistral.server.backends.openvino_pipeline import open_openvino_batch
from normistral.server.backends.openvino_sequence import find_unsupported, genai_config
from normistral.server.backends.settings import BLOCK_TOKENS, BatchSettings, plan_cache
from normistral.server.limits import ServerLimits
from normistral.server.model_handler import ModelHandler
from normistral.server.server import background_server

CONTEXT = 256
MIB = 2**20
SETTINGS = BatchSettings("auto", 64 * MIB, CONTEXT, slots=8)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    checkpoint = make_llama(tmp_path_factory.mktemp("checkpoint") / "llama", positions=CONTEXT, thinking=True)
    output = tmp_path_factory.mktemp("artifacts") / "tiny-llama"
    normistral.export_model(str(checkpoint), output, weights="fp16")
    return output


@pytest.fixture(scope="module")
def model(artifact):
    with normistral.load(artifact, exact=True) as model:
        yield model


@pytest.fixture(scope="module")
def shared(artifact):
    """One batch for all tests that leave it idle."""
    batch = open_exact(artifact)
    yield batch
    batch.close()


@pytest.fixture
def batch(shared):
    yield shared
    assert shared.idle


def open_exact(artifact, batch=SETTINGS, **options):
    return open_openvino_batch(Artifact.open(artifact, verify=False), batch, EngineConfig(exact=True, **options)).batch


def job(name, prompt_ids, tenant="somebody", **options):
    return Job(str(name), prompt_ids, GenerationConfig(**{"max_new_tokens": 12, **options}), tenant)


def finish(batch):
    """What comes of each job under way: its chunks put together, or the error that ended it."""
    chunks, errors = {}, {}
    while not batch.idle:
        for job_id, output in batch.step():
            assert job_id not in errors
            if isinstance(output, NormistralError):
                errors[job_id] = output
            else:
                assert not chunks.get(job_id) or chunks[job_id][-1].finish_reason is None
                chunks.setdefault(job_id, []).append(output)
    return {name: Completion.from_chunks(some) for name, some in chunks.items() if name not in errors} | errors


def answer(batch, *jobs):
    for one in jobs:
        batch.add(one)
    return finish(batch)


def prompts(count, length=20):
    random = np.random.default_rng(7)
    return [random.integers(5, 200, length + index).tolist() for index in range(count)]


def ask(model, prompt_ids, **options):
    return model.generate(prompt_ids, **{"max_new_tokens": 12, "temperature": 0.0, "draft": "off", **options})


def told(completion):
    """All of a completion but its timings."""
    return replace(completion, timings=None, logprobs=())


def test_answers_at_once_are_the_librarys(batch, model):
    asked = prompts(6)
    got = answer(batch, *(job(index, ids, max_new_tokens=24) for index, ids in enumerate(asked)))
    for index, ids in enumerate(asked):
        assert told(got[str(index)]) == told(ask(model, ids, max_new_tokens=24))
    timings = got["3"].timings
    assert (timings.prompt_tokens, timings.new_tokens) == (len(asked[3]), len(got["3"].token_ids))
    assert 0 < timings.prefill_s <= timings.ttft_s
    assert timings.decode_s > 0


@pytest.mark.parametrize(
    "make", [partial(make_mistral, sliding_window=16, positions=CONTEXT), partial(make_bloom, seq_length=CONTEXT)]
)
def test_windows_and_slopes_of_attention_are_the_librarys_too(tmp_path, make):
    normistral.export_model(str(make(tmp_path / "checkpoint")), tmp_path / "out", weights="fp16", verify=False)
    batch, asked = open_exact(tmp_path / "out"), prompts(3, length=60)
    got = answer(batch, *(job(index, ids, max_new_tokens=24, ignore_eos=True) for index, ids in enumerate(asked)))
    batch.close()
    with normistral.load(tmp_path / "out", exact=True) as model:
        for index, ids in enumerate(asked):
            assert told(got[str(index)]) == told(ask(model, ids, max_new_tokens=24, ignore_eos=True))


def test_a_job_may_come_while_others_are_under_way(batch, model):
    first, second = prompts(2)
    batch.add(job("first", first, max_new_tokens=20, ignore_eos=True))
    early = [progress for _ in range(4) for progress in batch.step()]
    batch.add(job("second", second))
    got = finish(batch)
    assert told(got["second"]) == told(ask(model, second))
    whole = tuple(progress.output.token_id for progress in early) + got["first"].token_ids
    assert whole == ask(model, first, max_new_tokens=20, ignore_eos=True).token_ids


def test_a_long_prompt_comes_in_pieces_and_others_go_on_meanwhile(artifact, model):
    long = prompts(1, 200)[0]
    batch = open_exact(artifact, replace(SETTINGS, slots=2), settings={"prefill_chunk": "16"})
    batch.add(job("short", long[:5], max_new_tokens=40, ignore_eos=True))
    batch.step()
    batch.add(job("long", long))
    told_of = [{progress.job_id for progress in batch.step()} for _ in range(200 // 18)]  # 16 + 2 tokens at once
    assert told_of == [{"short"}] * len(told_of)
    assert told(finish(batch)["long"]) == told(ask(model, long))
    batch.close()


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_end_is_where_the_library_sees_it(artifact, model, monkeypatch, ignore_eos):
    asked = prompts(4)
    stop_id = ask(model, asked[0]).token_ids[5]
    manifest = replace(model.manifest, stop_token_ids=(stop_id,))
    monkeypatch.setattr(model, "manifest", manifest)
    batch = open_openvino_batch(Artifact(artifact, manifest), SETTINGS, EngineConfig(exact=True)).batch
    options = {"max_new_tokens": 20, "ignore_eos": ignore_eos}
    got = answer(batch, *(job(index, ids, **options) for index, ids in enumerate(asked)))
    for index, ids in enumerate(asked):
        assert told(got[str(index)]) == told(ask(model, ids, **options))
    assert len(got["0"].token_ids) == (20 if ignore_eos else 6)
    near_end = prompts(1, CONTEXT - 3)[0]
    assert answer(batch, job("x", near_end, ignore_eos=True))["x"].finish_reason == "context"
    batch.close()


def test_a_stop_text_ends_an_answer_and_frees_its_place(batch, model):
    (ids,) = prompts(1)
    text = ask(model, ids, max_new_tokens=30, ignore_eos=True).text
    stop = text[8:11]
    expected = ask(model, ids, max_new_tokens=30, ignore_eos=True, stop=stop)
    assert expected.finish_reason == "stop"
    got = answer(batch, job("a", ids, max_new_tokens=30, ignore_eos=True, stop=(stop,)))
    assert told(got["a"]) == told(expected)


@pytest.mark.parametrize("budget", [0, 3])
@pytest.mark.parametrize("opened", [True, False])
def test_a_budget_closes_the_reasoning_as_in_the_library(batch, model, budget, opened):
    options = {"max_reasoning_tokens": budget, "max_new_tokens": 16, "ignore_eos": True}
    asked = [ids + [THINK] * opened for ids in prompts(4)]
    got = answer(batch, *(job(index, ids, **options) for index, ids in enumerate(asked)))
    for index, ids in enumerate(asked):
        assert told(got[str(index)]) == told(ask(model, ids, **options))
        if opened:
            assert END_THINK in got[str(index)].token_ids[: budget + 1]


def test_a_budget_may_take_the_last_token(batch, model):
    ids = [*prompts(1)[0], THINK]
    options = {"max_reasoning_tokens": 0, "max_new_tokens": 1}
    assert told(answer(batch, job("a", ids, **options))["a"]) == told(ask(model, ids, **options))


def test_the_penalty_counts_the_prompt_as_in_the_library(batch, model):
    options = {"repetition_penalty": 1.7, "max_new_tokens": 30, "ignore_eos": True}
    asked = prompts(3)
    got = answer(batch, *(job(index, ids, **options) for index, ids in enumerate(asked)))
    for index, ids in enumerate(asked):
        assert told(got[str(index)]) == told(ask(model, ids, **options))
        assert got[str(index)].token_ids != ask(model, ids, max_new_tokens=30, ignore_eos=True).token_ids


def test_logprobs_are_of_the_bare_model(batch, model):
    (ids,) = prompts(1)
    sampled = {"temperature": 3.0, "top_k": 20, "top_p": 0.9, "seed": 5}
    for options in ({"logprobs": 0}, {"logprobs": 0, "repetition_penalty": 1.5}, {"logprobs": 0, **sampled}):
        got = answer(batch, job("a", ids, ignore_eos=True, **options))["a"]
        scores = model.score([*ids, *got.token_ids], last=len(got.token_ids))
        assert np.allclose(got.logprobs, scores.logprobs, atol=1e-4)
    assert answer(batch, job("a", ids))["a"].logprobs == ()


def test_a_seed_gives_the_same_text_alone_and_among_others(batch):
    ids, other = prompts(2)
    sampled = {"temperature": 1.5, "max_new_tokens": 20, "ignore_eos": True}
    alone = answer(batch, job("a", ids, seed=3, **sampled))["a"]
    among = answer(batch, job("b", other, **sampled), job("a", ids, seed=3, **sampled), job("c", ids, **sampled))
    assert told(among["a"]) == told(alone)
    assert among["c"].token_ids != alone.token_ids
    for seed in (4, 3 + 2**32, 2**64 - 1):
        assert answer(batch, job("a", ids, seed=seed, **sampled))["a"].token_ids != alone.token_ids


def test_sampling_keeps_to_what_the_filters_leave(batch, model):
    """The first token of 200 answers: each filter leaves as many candidates as it does in the library."""
    (ids,) = prompts(1)
    first = next(iter(model.stream(ids, max_new_tokens=1, temperature=0.0, logprobs=100)))
    best = [token_id for token_id, _ in first.top_logprobs]
    likely = np.exp([logprob for _, logprob in first.top_logprobs])
    above_half = sum(np.concatenate([[0], np.cumsum(likely)[:-1]]) < 0.1)
    as_likely = sum(likely >= 0.7 * likely[0])
    for options, left in (({"top_k": 3}, 3), ({"top_p": 0.1}, above_half), ({"min_p": 0.7}, as_likely), ({}, None)):
        jobs = [job(i, ids, max_new_tokens=1, temperature=1.0, seed=i, ignore_eos=True, **options) for i in range(200)]
        drawn = {one.token_ids[0] for one in answer(batch, *jobs).values()}
        assert len(drawn) > 60 if left is None else drawn == set(best[:left])
    for options in ({"min_p": 1.0}, {"temperature": 1e-300}, {"top_k": 1}):  # another way to say greedy
        got = answer(batch, job("a", ids, **{"temperature": 1.0, **options}))["a"]
        assert got.token_ids == ask(model, ids).token_ids


def test_cancelling_frees_the_place_within_a_step(artifact):
    first, second, third = prompts(3)
    batch = open_exact(artifact, one_context(artifact))
    batch.add(job("a", first, max_new_tokens=CONTEXT, ignore_eos=True))
    batch.add(job("b", second))
    assert {progress.job_id for _ in range(3) for progress in batch.step()} == {"a"}
    batch.cancel("a")
    batch.cancel("a")
    batch.cancel("never heard of")
    assert batch.step() == []
    assert {progress.job_id for progress in batch.step()} == {"b"}
    batch.add(job("c", third))
    batch.cancel("c")
    assert finish(batch).keys() == {"b"}
    assert batch._pipeline.get_metrics().cache_usage >= 0
    batch.close()


def one_context(artifact):
    """Settings of a cache that just holds the whole context of one job."""
    plan = plan_cache(read_manifest(artifact).architecture, {"KV_CACHE_PRECISION": "f32"}, SETTINGS)
    return replace(SETTINGS, cache_bytes=plan.token_bytes * CONTEXT)


def test_a_full_cache_makes_jobs_wait_and_none_is_lost(artifact, model):
    batch = open_exact(artifact, one_context(artifact))
    assert (batch.plan.tokens, batch.plan.blocks) == (CONTEXT, CONTEXT // BLOCK_TOKENS)
    options = {"max_new_tokens": 60, "ignore_eos": True}
    asked = prompts(7, 60)  # 128 tokens each: two at once
    got = answer(batch, *(job(index, ids, **options) for index, ids in enumerate(asked)))
    for index, ids in enumerate(asked):
        assert told(got[str(index)]) == told(ask(model, ids, **options))
    assert batch._pipeline.get_metrics().cache_size_in_bytes == batch.plan.bytes
    batch.close()


def test_a_cache_that_holds_no_context_is_refused(artifact):
    with pytest.raises(UsageError, match="does not hold one context of 256 tokens"):
        open_exact(artifact, replace(one_context(artifact), cache_bytes=one_context(artifact).cache_bytes - 1))


@pytest.mark.parametrize("precision", ["u8", "f16", "f32", "u4"])
def test_the_cache_takes_what_was_planned(artifact, precision):
    opened = open_openvino_batch(
        Artifact.open(artifact, verify=False), SETTINGS, EngineConfig(settings={"KV_CACHE_PRECISION": precision})
    )
    told_bytes = opened.batch._pipeline.get_metrics().cache_size_in_bytes
    assert told_bytes == opened.batch.plan.bytes * (2 if precision == "u4" else 1)  # it counts 4 bits as a byte
    assert opened.capabilities.settings["KV_CACHE_PRECISION"] == precision
    assert opened.batch.plan.jobs == 8
    opened.batch.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"structure": Structure.json_object()}, "structured output"),
        ({"logprobs": 3}, "logprobs=3"),
        ({"logprobs": 0, "max_reasoning_tokens": 4}, "logprobs with max_reasoning_tokens"),
    ],
)
def test_what_openvino_genai_cannot_do_is_refused(batch, options, said):
    with pytest.raises(UsageError, match=said):
        batch.add(job("a", prompts(1)[0], **options))
    assert said in find_unsupported(GenerationConfig(**options))


def test_every_option_reaches_openvino_genai():
    config = GenerationConfig(
        temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=1.5, seed=9, ignore_eos=True
    )
    wanted = genai_config(config, 11, (2, 4), 0)
    assert (wanted.do_sample, wanted.temperature, wanted.top_k) == (True, 0.5, 7)
    assert (wanted.top_p, wanted.min_p, wanted.repetition_penalty) == (0.25, 0.125, 1.5)
    assert (wanted.rng_seed, wanted.ignore_eos, wanted.max_new_tokens) == (9, True, 11)
    assert (wanted.stop_token_ids, wanted.apply_chat_template, wanted.echo) == ({2, 4}, False, False)
    assert genai_config(GenerationConfig(temperature=1.0), 1, (2,), 0).top_k > 2**31  # all of them
    assert genai_config(config, 1, (2,), 1).rng_seed != wanted.rng_seed
    drawn = {genai_config(GenerationConfig(temperature=1.0), 1, (2,), 0).rng_seed for _ in range(8)}
    assert len(drawn) > 4
    assert genai_config(GenerationConfig(), 1, (), 0).ignore_eos  # a model without a stop token


def test_other_options_are_none_that_this_knows():
    """A new option of the library has to be thought of here too."""
    assert set(GenerationConfig.__dataclass_fields__) == {
        *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop"),
        *("ignore_eos", "logprobs", "max_reasoning_tokens", "draft", "structure"),
    }


def test_prefixes_are_kept_for_one_tenant_only(artifact):
    """A prompt of 96 tokens takes three steps of 32 until its first token, or one if it was in a cache."""
    asked = [np.random.default_rng(seed).integers(5, 200, 96).tolist() for seed in range(30)]

    def count_steps(batch, ids, tenant):
        batch.add(job("a", ids, tenant=tenant, max_new_tokens=1))
        return next(steps for steps in range(1, 9) if batch.step())

    options = {"settings": {"prefill_chunk": "31"}}  # and a token for the one job
    kept = open_exact(artifact, replace(SETTINGS, slots=1, one_tenant=True), **options)
    assert {(count_steps(kept, ids, "one"), count_steps(kept, ids, "one")) for ids in asked} == {(3, 1)}
    with pytest.raises(UsageError, match="for one tenant"):
        kept.add(job("b", asked[0], tenant="another"))
    assert kept.idle
    kept.close()
    apart = open_exact(artifact, replace(SETTINGS, slots=1), **options)
    assert {(count_steps(apart, ids, "one"), count_steps(apart, ids, "another")) for ids in asked} == {(3, 3)}
    apart.close()


def test_an_error_of_the_pipeline_ends_those_it_was_computing_and_no_others(artifact, model, monkeypatch):
    batch = open_exact(artifact, replace(SETTINGS, slots=1))
    first, second = prompts(2)
    batch.add(job("a", first))
    batch.add(job("b", second))
    batch.step()
    real = batch._pipeline

    class Broken:
        def step(self):
            raise RuntimeError("Exception from src/x.cpp:1:\nout of luck")

    monkeypatch.setattr(batch, "_pipeline", Broken())
    ((name, error),) = batch.step()
    assert (name, type(error), error.message) == ("a", EngineError, "openvino_genai failed: out of luck")
    monkeypatch.setattr(batch, "_pipeline", real)
    assert told(finish(batch)["b"]) == told(ask(model, second))
    batch.close()


def test_logits_that_are_no_numbers_end_that_answer(batch, monkeypatch):
    read = batch_module()._read_tokens
    monkeypatch.setattr(batch_module(), "_read_tokens", lambda handle: [(id, float("nan")) for id, _ in read(handle)])
    got = answer(batch, job("a", prompts(1)[0]))
    assert "not finite" in got["a"].message


def batch_module():
    from normistral.server.backends import openvino_batch

    return openvino_batch


def test_a_closed_batch_says_so(artifact):
    batch = open_exact(artifact)
    batch.add(job("a", prompts(1)[0]))
    batch.step()
    batch.close()
    assert batch.idle
    assert batch.step() == []
    with pytest.raises(ClosedError):
        batch.add(job("b", prompts(1)[0]))


def test_what_cannot_be_computed_together_goes_through_the_library(artifact, model):
    created = create_backend(artifact, SETTINGS, EngineConfig(exact=True))
    assert (created.batching, created.slots) == ("together", 8)
    asked = prompts(3)
    got = answer(created.batch, job("a", asked[0]), job("b", asked[1], logprobs=3), job("c", asked[2], logprobs=3))
    for name, ids in zip("abc", asked, strict=True):
        assert got[name].token_ids == ask(model, ids).token_ids
    created.batch.add(job("d", asked[0], logprobs=3))
    created.batch.add(job("e", asked[0]))
    created.batch.cancel("d")
    created.batch.cancel("e")
    assert finish(created.batch) == {}
    created.batch.close()
    turns = create_backend(artifact, replace(SETTINGS, batching="off"), EngineConfig(exact=True))
    assert turns.batching == "in turns"
    turns.batch.close()


@pytest.mark.parametrize("keys", [{}, {"a" * 16: "one", "b" * 16: "two"}])
def test_a_server_answers_as_the_library_does(artifact, model, keys):
    """Over HTTP and through the real worker process: several at once, in both routes, of one tenant or two."""
    handler = ModelHandler.open(artifact, SETTINGS, name="m", config=EngineConfig(exact=True))
    app = create_app([handler], ServerLimits(), Keys(keys))

    def ask_server(url, number, **fields):
        key = [*keys, ""][number % max(1, len(keys))]
        body = {"model": "m", "prompt": asked[number], "max_tokens": 12, "temperature": 0, **fields}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    asked = prompts(6)
    with background_server(app, 60) as url, ThreadPoolExecutor() as pool:
        choices = list(pool.map(lambda number: ask_server(url, number), range(6)))
        told_more = ask_server(url, 1, logprobs=2)
    for ids, choice in zip(asked, choices, strict=True):
        expected = ask(model, ids)
        assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
    assert told_more["text"] == choices[1]["text"]
    assert max(map(len, told_more["logprobs"]["top_logprobs"])) >= 2


_QUIET = """
import json, sys
from pathlib import Path
from normistral.artifact.artifact import Artifact
from normistral.runtime.engines.settings import EngineConfig
from normistral.server.app import create_app
from normistral.server.auth import Keys
from normistral.server.backends.base import Job
from normistral.server.backends.openvino_pipeline import open_openvino_batch
from normistral.server.backends.settings import BatchSettings
from normistral.server.limits import ServerLimits
from normistral.server.model_handler import ModelHandler
from normistral.server.server import background_server
from normistral.runtime.options import GenerationConfig
folder = Path(sys.argv[1])
settings = json.loads(sys.argv[2])
artifact = Artifact.open(folder)
config = EngineConfig(settings=settings)
batch = open_openvino_batch(artifact, BatchSettings("auto", 2**26, 256, 2), config).batch
batch.add(Job("a", [7, 8, 9], GenerationConfig(max_new_tokens=3), "x"))
while not batch.idle:
    batch.step()
batch.add(Job("b", [7, 8, 9], GenerationConfig(max_new_tokens=100, ignore_eos=True), "x"))
batch.step()
batch.close()  # in the middle of an answer
"""


def run_apart(artifact, settings="{}", **environ):
    command = [sys.executable, "-c", _QUIET, str(artifact), settings]
    return subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, check=True, timeout=120
    )


def test_nothing_is_printed(artifact):
    done = run_apart(artifact)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_settings_are_in_force_in_the_pipeline_itself(artifact):
    """openvino_genai prints its compiled model's properties when told to log."""
    given = '{"INFERENCE_NUM_THREADS": "1", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32", "KV_CACHE_PRECISION": "u8"}'
    said = run_apart(artifact, given, OPENVINO_LOG_LEVEL="3").stdout
    shown = {name.strip(): value.strip() for name, _, value in (line.partition(": ") for line in said.splitlines())}
    assert shown["INFERENCE_NUM_THREADS"] == "1"
    assert shown["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "32"
    assert shown["KV_CACHE_PRECISION"] == "u8"
    assert shown["INFERENCE_PRECISION_HINT"] == "f32"
