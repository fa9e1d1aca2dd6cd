"""Jobs that take turns: whose turn it is, what they share, and what no tenant ever gets of another."""

import random
from collections import Counter

import pytest
from scripted_models import make_base_model, make_model
from tiny_models import VOCABULARY

from normistral.errors import EngineError, NormistralError
from normistral.runtime.chunks import Chunk, Completion
from normistral.runtime.engines.scripted import random_logits
from normistral.runtime.options import GenerationConfig
from normistral.server.backends.base import BatchSettings, Job, cache_token_bytes
from normistral.server.backends.scheduler import RoundRobinScheduler

CONTEXT = 400


@pytest.fixture
def model(tmp_path):
    return make_base_model(tmp_path / "model", random_logits(VOCABULARY))


def make_queue(model, contexts: float = 8) -> RoundRobinScheduler:
    return RoundRobinScheduler(
        model, BatchSettings("off", int(contexts * CONTEXT * cache_token_bytes(model.manifest)), CONTEXT)
    )


def job(name: str, prompt: list[int], tenant: str = "a", **options) -> Job:
    return Job(name, prompt, GenerationConfig(**({"max_new_tokens": 6, "ignore_eos": True} | options)), tenant)


def run(queue: RoundRobinScheduler) -> tuple[dict[str, list[Chunk | NormistralError]], list[str]]:
    """Outcomes of every job, and the order in which they came."""
    outcomes, order = {}, []
    while not queue.idle:
        for job_id, output in queue.step():
            outcomes.setdefault(job_id, []).append(output)
            order.append(job_id)
    return outcomes, order


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3, "top_k": 40, "logprobs": 2}, {"stop": ("q",)}])
def test_answers_are_the_library_s_however_jobs_mix(model, options) -> None:
    prompts = {f"job{i}": [5 + i, *range(20, 20 + 9 * i)] for i in range(5)}
    queue = make_queue(model)
    for name, prompt in prompts.items():
        queue.add(job(name, prompt, f"tenant{len(name) % 2}", max_new_tokens=20, **options))
    outcomes, _ = run(queue)
    for name, prompt in prompts.items():
        own = model.generate(prompt, max_new_tokens=20, ignore_eos=True, **options)
        mixed = Completion.from_chunks(outcomes[name])
        assert (mixed.text, mixed.token_ids, mixed.finish_reason, mixed.logprobs) == (
            own.text, own.token_ids, own.finish_reason, own.logprobs,
        )  # fmt: skip


def test_a_tenant_with_many_jobs_gets_no_more_turns_than_one_with_one(model) -> None:
    queue = make_queue(model, contexts=40)
    for i in range(20):
        queue.add(job(f"many{i}", [7, 8, i + 10], "busy", max_new_tokens=10))
    queue.add(job("one", [7, 8, 9], "patient", max_new_tokens=10))
    _, order = run(queue)
    ahead = order[: order.index("one") + 1 + order[::-1].index("one")]
    first_to_last = order[: len(order) - order[::-1].index("one")]
    assert ahead
    assert Counter(name == "one" for name in first_to_last)[False] <= 10


def test_a_long_prompt_does_not_hold_up_the_others(model) -> None:
    queue = make_queue(model)
    queue.add(job("long", [5 + i % 200 for i in range(300)], "a"))
    queue.add(job("short", [9], "b"))
    _, order = run(queue)
    assert order.index("long") > order.index("short") + 4  # 300 tokens are 18 slices of 16


def test_a_slice_gives_way_and_a_prompt_is_counted_once(model) -> None:
    queue = make_queue(model)
    queue.add(job("long", [5 + i % 200 for i in range(100)]))
    outcomes, _ = run(queue)
    timings = outcomes["long"][-1].timings
    assert (timings.prompt_tokens, timings.cached_tokens, timings.new_tokens) == (100, 0, 6)
    assert timings.ttft_s >= timings.prefill_s > 0
    forwarded = model._backend.forwarded
    assert [len(tokens) for tokens in forwarded[:7]] == [16] * 6 + [4]  # as the library cuts it


def test_a_beginning_is_computed_once_for_a_tenant(model) -> None:
    document = [5 + i % 200 for i in range(200)]
    queue = make_queue(model)
    for i in range(3):
        queue.add(job(f"question{i}", [*document, 10 + i]))
        outcomes, _ = run(queue)
        cached = outcomes[f"question{i}"][-1].timings.cached_tokens
        assert cached == (0 if i == 0 else 200)


def test_a_prompt_that_is_scored_is_computed_whole_once_and_counted_so(model) -> None:
    document = [5 + i % 200 for i in range(100)]
    queue = make_queue(model)
    queue.add(job("first", document))
    run(queue)
    before = len(model._backend.forwarded)
    queue.add(job("scored", [*document, 9], prompt_logprobs=0, max_new_tokens=1))
    outcomes, _ = run(queue)
    assert outcomes["scored"][-1].timings.cached_tokens == 0
    assert sum(map(len, model._backend.forwarded[before:])) == 101


def test_a_conversation_goes_on_where_it_was(model) -> None:
    queue = make_queue(model)
    queue.add(job("first", list(range(10, 60))))
    outcomes, _ = run(queue)
    said = [chunk.token_id for chunk in outcomes["first"]]
    queue.add(job("second", [*range(10, 60), *said, 9]))
    outcomes, _ = run(queue)
    assert outcomes["second"][-1].timings.cached_tokens == 50 + len(said) - 1  # the last one was never fed


def test_nothing_of_one_tenant_is_reused_for_another(model) -> None:
    """10,000 canaries: prompts of other tenants that share all, half or a little with one that is cached."""
    random_source = random.Random(0)
    secret = [5 + random_source.randrange(250) for _ in range(300)]
    queue = make_queue(model, contexts=3)
    queue.add(job("secret", secret, "owner", max_new_tokens=1))
    run(queue)
    for i in range(10_000):
        length = random_source.choice((1, 2, 150, 299, 300)) if i % 100 == 0 else random_source.randrange(1, 8)
        queue.add(job(f"canary{i}", secret[:length], f"other{i}", max_new_tokens=1))
        outcomes, _ = run(queue)
        assert outcomes[f"canary{i}"][-1].timings.cached_tokens == 0
        if i % 500 == 0:
            queue.add(job(f"own{i}", secret, "owner", max_new_tokens=1))
            outcomes, _ = run(queue)
            assert outcomes[f"own{i}"][-1].timings.cached_tokens in (0, 299)  # it may have been thrown out


def test_running_jobs_of_others_are_no_source_either(model) -> None:
    queue = make_queue(model)
    secret = [5 + i % 200 for i in range(300)]
    queue.add(job("owner", secret, "a", max_new_tokens=50))
    for _ in range(30):
        queue.step()
    queue.add(job("thief", secret, "b"))
    outcomes, _ = run(queue)
    assert outcomes["thief"][-1].timings.cached_tokens == 0


def test_caches_stay_within_their_memory(model) -> None:
    queue = make_queue(model, contexts=2)
    for i in range(30):
        queue.add(job(f"job{i}", [10 + i, *range(20, 120)], f"tenant{i % 3}", max_new_tokens=20))
    while not queue.idle:
        queue.step()
        running = [one.cost for one in queue._running.values()]
        kept = [one.sequence.length for one in queue._kept]
        assert sum(running) + sum(kept) <= 2 * CONTEXT
    assert kept


def test_a_job_that_needs_all_of_it_waits_for_the_others(model) -> None:
    queue = make_queue(model, contexts=1)
    queue.add(job("small", [9], "a"))
    queue.add(job("large", [9, 9], "b", max_new_tokens=398))
    queue.add(job("behind", [9, 9], "c"))
    _, order = run(queue)
    assert list(dict.fromkeys(order)) == ["small", "large", "behind"]


def test_a_cancelled_job_is_heard_of_no_more(model) -> None:
    queue = make_queue(model)
    queue.add(job("gone", list(range(10, 200)), max_new_tokens=100))
    queue.add(job("stays", [9]))
    queue.step()
    queue.cancel("gone")
    queue.cancel("never there")
    outcomes, _ = run(queue)
    assert set(outcomes) == {"stays"}
    queue.add(job("waiting", [9]))
    queue.cancel("waiting")
    assert queue.idle


def test_an_engine_error_ends_one_job(tmp_path) -> None:
    def logits(token_ids):
        if 99 in token_ids:
            raise EngineError("it broke", "mend it")
        return random_logits(VOCABULARY)(token_ids)

    queue = make_queue(make_model(tmp_path / "model", logits))
    queue.add(job("bad", [9, 99]))
    queue.add(job("good", [9, 98]))
    outcomes, _ = run(queue)
    assert str(outcomes["bad"][-1]) == "it broke"
    assert len(outcomes["good"]) == 6
    queue.add(job("again", [9, 98, 7]))
    assert len(run(queue)[0]["again"]) == 6
