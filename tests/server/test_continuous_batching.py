"""Many answers at once on one model: what comes out is what the library gives, however many are under way."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import httpx
import numpy as np
import pytest
from shared_folders import make_once
from tiny_bloom import make_bloom
from tiny_models import END_THINK, THINK, make_llama, make_mistral

import normistral
from normistral.artifact.manifest import read_manifest
from normistral.errors import ClosedError, EngineError, NormistralError, UsageError
from normistral.runtime.chunks import Completion
from normistral.runtime.engines.block_pool import BLOCK_TOKENS
from normistral.runtime.engines.openvino_paged import PagedBackend
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.options import GenerationConfig
from normistral.runtime.structured.structure import Structure
from normistral.server.app import create_app
from normistral.server.auth import Keys
from normistral.server.backends.base import BatchSettings, Job, cache_token_bytes
from normistral.server.backends.create import create_backend
from normistral.server.limits import ServerLimits
from normistral.server.model_handler import ModelHandler
from normistral.server.server import background_server

CONTEXT = 256
MIB = 2**20
SETTINGS = BatchSettings("auto", 64 * MIB, CONTEXT, slots=8)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return export_thinking_llama(tmp_path_factory)


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


def export_thinking_llama(factory):
    """An artifact with this file's context, exported once for all processes of the tests."""

    def export(output):
        checkpoint = make_llama(factory.mktemp("checkpoint") / "llama", positions=CONTEXT, thinking=True)
        normistral.export_model(str(checkpoint), output, weights="fp16")

    return make_once(factory, "thinking-llama", export)


def open_exact(artifact, batch=SETTINGS, **options):
    created = create_backend(artifact, batch, EngineConfig(exact=True, **options))
    assert created.told.batching == "together"
    return created.batch


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


def fail_forwards_of(batch, name, monkeypatch):
    """Let every forward fail that this job has a part in."""
    real, broken = batch._backend.forward_batch, batch._running[name].engine

    def fail(calls):
        if any(call.engine is broken for call in calls):
            raise EngineError("out of luck")
        return real(calls)

    monkeypatch.setattr(batch._backend, "forward_batch", fail)


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
    told_of = [{progress.job_id for progress in batch.step()} for _ in range(200 // 16)]
    assert told_of == [{"short"}] * len(told_of)
    assert told(finish(batch)["long"]) == told(ask(model, long))
    batch.close()


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_end_is_where_the_library_sees_it(artifact, model, monkeypatch, ignore_eos):
    asked = prompts(4)
    stop_id = ask(model, asked[0]).token_ids[5]
    manifest = replace(model.manifest, stop_token_ids=(stop_id,))
    monkeypatch.setattr(model, "manifest", manifest)
    batch = open_exact(artifact)
    batch._model.manifest = manifest
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


def test_a_seed_is_the_librarys_to_the_last_bit_in_any_arithmetic(artifact):
    """At run time keys, values and activations are rounded to 8 bits: one bit more or less, and texts part."""
    ids, *others = prompts(4, 40)
    sampled = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "max_new_tokens": 40, "ignore_eos": True, "logprobs": 2}
    settings = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32", "prefill_chunk": "16"}
    with normistral.load(artifact, settings=settings) as model:
        expected = ask(model, ids, seed=8, **sampled)
    batch = create_backend(artifact, SETTINGS, EngineConfig(settings=settings)).batch
    for index, other in enumerate(others):
        batch.add(job(index, other, **sampled))
    batch.step()
    got = answer(batch, job("a", ids, seed=8, **sampled), job("b", ids, **sampled))["a"]
    assert (told(got), got.logprobs) == (told(expected), expected.logprobs)
    batch.close()


def count_forwards(batch, monkeypatch):
    real, counted = batch._backend.forward_batch, []

    def count(calls):
        counted.append(len(calls))
        return real(calls)

    monkeypatch.setattr(batch._backend, "forward_batch", count)
    return counted


@pytest.mark.parametrize("together", [True, False])
def test_answers_with_seeds_share_their_forwards_where_that_leaves_their_bits(artifact, model, monkeypatch, together):
    if not together:
        monkeypatch.setattr(PagedBackend, "measure_batch_invariance", lambda _: False)
    batch = open_exact(artifact)
    counted = count_forwards(batch, monkeypatch)
    options = {
        "seed": 4,
        "temperature": 1.5,
        "top_k": 40,
        "top_p": 0.9,
        "max_new_tokens": 12,
        "ignore_eos": True,
        "logprobs": 1,
    }
    asked = prompts(3, 70)
    got = answer(batch, *(job(index, ids, **options) for index, ids in enumerate(asked)))
    assert (max(counted), len(counted)) == ((3, 12) if together else (1, 36))  # the first computes the prompts
    for index, ids in enumerate(asked):
        expected = ask(model, ids, **options)
        assert (told(got[str(index)]), got[str(index)].logprobs) == (told(expected), expected.logprobs)
    batch.close()


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
    assert {progress.job_id for progress in batch.step()} == {"b"}
    batch.add(job("c", third))
    batch.cancel("c")
    assert finish(batch).keys() == {"b"}
    assert free_blocks(batch) == batch.plan.blocks
    batch.close()


def one_context(artifact):
    """Settings of a cache that just holds the whole context of one job."""
    return replace(SETTINGS, cache_bytes=cache_token_bytes(read_manifest(artifact)) * CONTEXT)


def free_blocks(batch):
    """Blocks of the KV cache that no answer holds; those that are kept for later ones count."""
    pool = batch._backend._pool
    pool._count_returned()
    return len(pool._free) + len(pool._idle) - 1  # that of a companion, which is there in a forward only


def test_a_full_cache_makes_jobs_wait_and_none_is_lost(artifact, model):
    batch = open_exact(artifact, one_context(artifact))
    assert (batch.plan.tokens, batch.plan.blocks) == (CONTEXT, CONTEXT // BLOCK_TOKENS)
    options = {"max_new_tokens": 60, "ignore_eos": True}
    asked = prompts(7, 60)  # 128 tokens each: two at once
    got = answer(batch, *(job(index, ids, **options) for index, ids in enumerate(asked)))
    for index, ids in enumerate(asked):
        assert told(got[str(index)]) == told(ask(model, ids, **options))
    assert free_blocks(batch) == batch.plan.blocks
    batch.close()


def test_a_cache_that_holds_no_context_is_refused(artifact):
    with pytest.raises(UsageError, match="does not hold one context of 256 tokens"):
        open_exact(artifact, replace(one_context(artifact), cache_bytes=one_context(artifact).cache_bytes - 1))


@pytest.mark.parametrize("precision", ["u8", "f16", "f32"])
def test_the_cache_takes_what_was_planned(artifact, precision):
    config = EngineConfig(settings={"KV_CACHE_PRECISION": precision})
    created = create_backend(artifact, SETTINGS, config)
    assert sum(array.nbytes for array in created.batch._backend._pool._bytes.values()) == created.batch.plan.bytes
    assert (created.told.cache_bytes, created.told.slots) == (created.batch.plan.bytes, 8)
    assert created.capabilities.settings["KV_CACHE_PRECISION"] == precision
    created.batch.close()


@pytest.mark.parametrize("setting", [{"KV_CACHE_PRECISION": "u4"}, {"attention": "stateful"}])
def test_engines_without_blocks_take_turns(artifact, setting):
    created = create_backend(artifact, SETTINGS, EngineConfig(settings=setting))
    assert created.told.batching == "in turns"
    created.batch.close()


@pytest.mark.parametrize(
    "options",
    [
        {"structure": Structure.json_schema({"type": "array", "items": {"enum": ["one", "two"]}, "maxItems": 3})},
        {"structure": Structure.choice(["yes, of course", "no"]), "logprobs": 2},
        {"logprobs": 3, "ignore_eos": True},
        {"prompt_logprobs": 1},
        {"seed": 5, "temperature": 1.5, "top_p": 0.9, "top_k": 40, "ignore_eos": True, "logprobs": 2},
        {"seed": 6, "temperature": 1.0, "top_k": 40, "top_p": 0.9, "structure": Structure.regex("[a-z]{3,9}")},
        {"frequency_penalty": 0.5, "logit_bias": ((7, 3.0),), "ignore_eos": True},
    ],
)
def test_structures_reports_and_seeds_are_the_librarys(batch, model, options):
    asked = prompts(3, 50)
    got = answer(batch, *(job(index, ids, max_new_tokens=30, **options) for index, ids in enumerate(asked)))
    for index, ids in enumerate(asked):
        expected, one = ask(model, ids, max_new_tokens=30, **options), got[str(index)]
        assert told(one) == told(expected)
        assert np.allclose(one.logprobs, expected.logprobs, atol=1e-4)


def test_a_beginning_is_computed_once_for_each_tenant(batch, model):
    """32 tokens a block; the last token of a prompt is computed for its logits."""
    random = np.random.default_rng(11)
    shared, ends = random.integers(5, 200, 130).tolist(), random.integers(5, 200, (4, 10)).tolist()

    def cached(tenant, ids, **options):
        one = answer(batch, job("a", ids, tenant=tenant, ignore_eos=True, **options))["a"]
        assert one.token_ids == ask(model, ids, ignore_eos=True).token_ids
        return one.timings.cached_tokens

    assert [cached("one", shared + end) for end in ends[:2]] == [0, 128]
    assert [cached("two", shared + end) for end in ends[2:]] == [0, 128]
    assert cached("one", shared[:128]) == 96
    assert cached("one", shared[:31]) == 0
    assert cached("one", [*shared[:64], 5 if shared[64] != 5 else 6, *shared[65:]]) == 64
    assert cached("one", shared, seed=1) == 0
    assert cached("one", shared + ends[0], prompt_logprobs=0) == 0  # computed whole


def test_the_next_turn_of_a_conversation_goes_on_from_the_answer(batch, model):
    (ids,) = prompts(1, 70)
    first = answer(batch, job("a", ids, max_new_tokens=60, ignore_eos=True))["a"]
    longer = [*ids, *first.token_ids, 7, 8, 9]
    second = answer(batch, job("b", longer))["b"]
    assert second.timings.cached_tokens == (70 + 59) // 32 * 32  # the last token was not fed
    assert told(second) == told(ask(model, longer))


def test_those_who_come_together_wait_for_the_beginning_that_one_computes(batch):
    shared = np.random.default_rng(12).integers(5, 200, 140).tolist()
    got = answer(batch, *(job(index, [*shared, 10 + index, 9]) for index in range(4)))
    assert sorted(one.timings.cached_tokens for one in got.values()) == [0, 128, 128, 128]


def test_the_oldest_beginnings_make_room(artifact, model):
    batch = open_exact(artifact, one_context(artifact))
    first, second, third = np.random.default_rng(13).integers(5, 200, (3, 100)).tolist()

    def cached(ids):
        one = answer(batch, job("a", ids, max_new_tokens=2))["a"]
        assert one.token_ids == ask(model, ids, max_new_tokens=2).token_ids
        return one.timings.cached_tokens

    assert [cached(first), cached(second), cached(first)] == [0, 0, 96]
    assert cached(third) == 0  # in the place of the end of the second
    assert [cached(first), cached(second) < 96] == [96, True]
    batch.close()


def test_no_canary_crosses_from_one_tenant_to_another(batch):
    """Tenants with names that others' begin with, and the same text: nothing of it is found in the cache."""
    text = np.random.default_rng(14).integers(5, 200, 70).tolist()
    for number, tenant in enumerate(["k", "k1", "k11", "", "K", "k ", "\u006b\u0301", "k\0"] * 2):
        one = answer(batch, job("a", text, tenant=tenant, max_new_tokens=1))["a"]
        assert one.timings.cached_tokens == (0 if number < 8 else 64)


def test_tenants_get_pieces_of_their_prompts_in_turn(artifact):
    long, other, short = (prompts(1, length)[0] for length in (220, 221, 20))
    batch = open_exact(artifact, settings={"prefill_chunk": "16"})
    batch.add(job("long", long, "one"))
    batch.add(job("other", other, "one"))
    batch.step()
    batch.add(job("short", short, "two"))
    steps = next(steps for steps in range(1, 40) if any(job_id == "short" for job_id, _ in batch.step()))
    assert steps <= 4
    finish(batch)
    batch.close()


def test_an_error_of_a_forward_ends_those_that_cannot_be_computed_and_no_others(artifact, model, monkeypatch):
    batch = open_exact(artifact)
    asked = prompts(3)
    for name, ids in zip("abc", asked, strict=True):
        batch.add(job(name, ids))
    early = [update for _ in range(3) for update in batch.step()]
    fail_forwards_of(batch, "b", monkeypatch)
    got = finish(batch)
    assert (type(got["b"]), got["b"].message) == (EngineError, "out of luck")
    for name, ids in (("a", asked[0]), ("c", asked[2])):
        begun = tuple(update.output.token_id for update in early if update.job_id == name)
        assert begun + got[name].token_ids == ask(model, ids).token_ids
    assert free_blocks(batch) == batch.plan.blocks
    batch.close()


def test_logits_that_are_no_numbers_end_that_answer(batch, model, monkeypatch):
    real, asked = batch._backend.forward_batch, prompts(2)

    def spoil(calls):
        bad = batch._running["a"].engine if "a" in batch._running else None
        return [
            np.full_like(logits, np.nan) if call.engine is bad else logits
            for call, logits in zip(calls, real(calls), strict=True)
        ]

    monkeypatch.setattr(batch._backend, "forward_batch", spoil)
    got = answer(batch, job("a", asked[0]), job("b", asked[1]))
    assert "not finite" in got["a"].message
    assert told(got["b"]) == told(ask(model, asked[1]))


def test_a_bug_in_one_answer_ends_that_one_and_tells_no_text(batch, model, monkeypatch, caplog):
    run, asked = batch._model.run, prompts(2)

    def run_badly(sequence, prompt_ids, *rest):
        for number, chunk in enumerate(run(sequence, prompt_ids, *rest)):
            if prompt_ids == asked[0] and number == 2:
                raise ValueError(f"a secret {prompt_ids}")
            yield chunk

    monkeypatch.setattr(batch._model, "run", run_badly)
    got = answer(batch, job("a", asked[0]), job("b", asked[1]))
    assert got["a"].message == "this answer failed in normistral: ValueError"
    assert told(got["b"]) == told(ask(model, asked[1]))
    assert "run_badly" in caplog.text
    assert str(asked[0]) not in caplog.text
    assert free_blocks(batch) == batch.plan.blocks


def test_an_interrupt_loses_nothing(artifact, model, monkeypatch):
    batch = open_exact(artifact)
    asked = prompts(2, 60)
    for name, ids in zip("ab", asked, strict=True):
        batch.add(job(name, ids))
    real = batch._backend.forward_batch

    def interrupted(calls):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch._backend, "forward_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch.step()
    monkeypatch.setattr(batch._backend, "forward_batch", real)
    got = finish(batch)
    for name, ids in zip("ab", asked, strict=True):
        assert told(got[name]) == told(ask(model, ids))
    batch.close()


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_who_leaves_in_the_middle_gives_blocks_back(artifact, steps):
    batch = open_exact(artifact, settings={"prefill_chunk": "32"})
    batch.add(job("a", prompts(1, 90)[0], max_new_tokens=50, ignore_eos=True))
    for _ in range(steps):
        batch.step()
    batch.cancel("a")
    assert batch.idle
    assert free_blocks(batch) == batch.plan.blocks
    batch.close()


def test_a_closed_batch_says_so(artifact):
    batch = open_exact(artifact)
    batch.add(job("a", prompts(1)[0]))
    batch.step()
    batch.close()
    assert batch.idle
    assert batch.step() == []
    with pytest.raises(ClosedError):
        batch.add(job("b", prompts(1)[0]))


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
from normistral.runtime.engines.settings import EngineConfig
from normistral.server.app import create_app
from normistral.server.auth import Keys
from normistral.server.backends.base import Job
from normistral.server.backends.create import create_backend
from normistral.server.backends.base import BatchSettings
from normistral.server.limits import ServerLimits
from normistral.server.model_handler import ModelHandler
from normistral.server.server import background_server
from normistral.runtime.options import GenerationConfig
folder = Path(sys.argv[1])
settings = json.loads(sys.argv[2])
config = EngineConfig(settings=settings)
batch = create_backend(folder, BatchSettings("auto", 2**26, 256, 2), config).batch
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


def test_the_check_of_bits_at_the_start_takes_no_memory_for_good(artifact):
    settings = replace(one_context(artifact), context=32, cache_bytes=one_context(artifact).cache_bytes // 8)
    batch = open_exact(artifact, settings)
    assert batch.plan.blocks == 1
    assert batch._backend._pool._capacity == 8  # the least that there are
    batch.close()
