"""Many answers at once with onnxruntime: the library's answers, in one forward a step."""

import numpy as np
import pytest
from test_continuous_batching import CONTEXT, SETTINGS, answer, ask, fail_forwards_of, finish, job, prompts, told
from tiny_bloom import make_bloom
from tiny_models import make_llama, make_mistral

import normistral
from normistral.errors import EngineError
from normistral.runtime.engines import onnx_batch
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.structured.structure import Structure
from normistral.server.backends.create import create_backend


def export(checkpoint, output):
    normistral.export_model(str(checkpoint), output, format="onnx", weights="int8", verify=False)
    return output


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    checkpoint = make_llama(
        tmp_path_factory.mktemp("checkpoint") / "llama", positions=CONTEXT, thinking=True, head_dim=32
    )
    return export(checkpoint, tmp_path_factory.mktemp("artifacts") / "tiny-llama")


@pytest.fixture(scope="module")
def model(artifact):
    with normistral.load(artifact, exact=True) as model:
        yield model


@pytest.fixture
def batch(artifact):
    created = create_backend(artifact, SETTINGS, EngineConfig(exact=True))
    assert created.told.batching == "together"
    yield created.batch
    created.batch.close()


@pytest.fixture
def forwards(monkeypatch):
    """Rows and tokens a row of each forward."""
    real, seen = onnx_batch.OnnxBatch._run, []

    def run(self, begin, token_ids, last):
        seen.append((len(token_ids), len(token_ids[0])))
        return real(self, begin, token_ids, last)

    monkeypatch.setattr(onnx_batch.OnnxBatch, "_run", run)
    return seen


def test_answers_are_the_librarys_and_share_a_forward(batch, model, forwards):
    asked = prompts(6)
    options = {"max_new_tokens": 24, "ignore_eos": True}
    got = answer(batch, *(job(index, ids, **options) for index, ids in enumerate(asked)))
    assert sorted(forwards) == [(1, len(ids)) for ids in asked] + [(6, 1)] * 23
    for index, ids in enumerate(asked):
        assert told(got[str(index)]) == told(ask(model, ids, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"structure": Structure.json_schema({"type": "array", "items": {"enum": ["one", "two"]}, "maxItems": 3})},
        {"structure": Structure.choice(["yes, of course", "no"]), "logprobs": 2},
        {"prompt_logprobs": 1},
        {"seed": 5, "temperature": 1.5, "top_p": 0.9, "top_k": 40, "ignore_eos": True, "logprobs": 2},
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


def test_a_seed_is_the_librarys_to_the_last_bit_in_any_arithmetic(artifact):
    ids, *others = prompts(4, 40)
    sampled = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "max_new_tokens": 40, "ignore_eos": True, "logprobs": 2}
    with normistral.load(artifact) as model:
        expected = ask(model, ids, seed=8, **sampled)
    batch = create_backend(artifact, SETTINGS, EngineConfig()).batch
    got = answer(batch, *(job(i, other, **sampled) for i, other in enumerate(others)), job("a", ids, seed=8, **sampled))
    assert (told(got["a"]), got["a"].logprobs) == (told(expected), expected.logprobs)
    batch.close()


@pytest.mark.parametrize("leaves", ["0", "1", "3"])
def test_who_leaves_and_who_comes_changes_nothing_for_the_others(batch, model, leaves, monkeypatch):
    monkeypatch.setattr(onnx_batch, "CAPACITY_STEP", 32)  # so that the buffers move several times
    asked = dict(zip("01234", prompts(5, 25), strict=True))
    options = {"max_new_tokens": 60, "ignore_eos": True}
    for name in "0123":
        batch.add(job(name, asked[name], **options))
    early = [update for _ in range(9) for update in batch.step()]
    batch.cancel(leaves)
    batch.add(job("4", asked["4"], **options))
    got = finish(batch)
    assert got.keys() == set("01234") - {leaves}
    for name, one in got.items():
        begun = tuple(update.output.token_id for update in early if update.job_id == name)
        assert begun + one.token_ids == ask(model, asked[name], **options).token_ids


def test_a_beginning_is_computed_once_for_each_tenant(batch, model):
    shared = np.random.default_rng(11).integers(5, 200, 130).tolist()

    def cached(tenant, ids):
        one = answer(batch, job("a", ids, tenant=tenant, ignore_eos=True))["a"]
        assert one.token_ids == ask(model, ids, ignore_eos=True).token_ids
        return one.timings.cached_tokens

    assert [cached("one", [*shared, end]) for end in (7, 8)] == [0, 128]
    assert [cached("two", [*shared, end]) for end in (7, 8)] == [0, 128]
    assert cached("one", shared[:128]) == 96


def test_published_blocks_and_sequences_stay_within_the_plan(batch):
    for index, ids in enumerate(prompts(12, 200)):
        answer(batch, job(index, ids, max_new_tokens=2))
    kept = batch._backend._blocks
    assert 0 < len(kept) <= batch.plan.blocks + 1
    held = next(iter(kept.values()))
    assert sum(block.nbytes for block in held) == batch._backend.token_bytes * 32


def test_an_error_of_onnxruntime_ends_that_answer_and_leaves_the_others(batch, model, monkeypatch):
    asked = prompts(3)
    for name, ids in zip("abc", asked, strict=True):
        batch.add(job(name, ids))
    early = [update for _ in range(3) for update in batch.step()]
    fail_forwards_of(batch, "b", monkeypatch)
    got = finish(batch)
    assert isinstance(got["b"], EngineError)
    for name, ids in (("a", asked[0]), ("c", asked[2])):
        begun = tuple(update.output.token_id for update in early if update.job_id == name)
        assert begun + got[name].token_ids == ask(model, ids).token_ids


def test_windows_of_attention_are_the_librarys_too(tmp_path):
    export(make_mistral(tmp_path / "checkpoint", sliding_window=16, positions=CONTEXT, head_dim=32), tmp_path / "out")
    batch, asked = create_backend(tmp_path / "out", SETTINGS, EngineConfig(exact=True)).batch, prompts(3, 60)
    got = answer(batch, *(job(index, ids, max_new_tokens=24, ignore_eos=True) for index, ids in enumerate(asked)))
    batch.close()
    with normistral.load(tmp_path / "out", exact=True) as model:
        for index, ids in enumerate(asked):
            assert told(got[str(index)]) == told(ask(model, ids, max_new_tokens=24, ignore_eos=True))


def test_attention_with_a_bias_takes_turns(tmp_path):
    export(make_bloom(tmp_path / "checkpoint", seq_length=CONTEXT), tmp_path / "out")
    created = create_backend(tmp_path / "out", SETTINGS, EngineConfig(exact=True))
    assert created.told.batching == "in turns"
    created.batch.close()
