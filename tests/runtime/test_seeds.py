"""A seeded request computes the same bits whatever was computed before it, on every engine.

Log-probabilities are compared as they are, so that a difference in the last bit is found without waiting for a near tie
to show it in the text.
"""

import dataclasses

import pytest
from drafting_models import draft_always
from scripted_models import make_base_model, make_model
from tiny_models import VOCABULARY, make_mistral

import normistral
from normistral.runtime import sessions
from normistral.runtime.chunks import Completion
from normistral.runtime.engines.scripted import random_logits
from normistral.runtime.options import GenerationConfig
from normistral.server.backends.base import CONTINUOUS, BatchSettings, Job, cache_token_bytes
from normistral.server.backends.scheduler import RoundRobinScheduler
from normistral.server.service import ServedModel

CHUNK, CONTEXT = 16, 256
PROMPT = [5 + 7 * i % 250 for i in range(70)]  # four chunks and a part of one
SEEDED = {"seed": 3, "temperature": 1.5, "max_new_tokens": 12, "ignore_eos": True, "logprobs": 0}
PLAIN = {"temperature": 0.7, "max_new_tokens": 12, "ignore_eos": True}
EXPORTS = {
    "openvino-int4": {"format": "openvino", "weights": "int4", "recipe": "fast"},
    "onnx-int4": {"format": "onnx", "weights": "int4", "recipe": "fast"},
    "onnx-plain": {"format": "onnx", "weights": "fp32", "graph": "plain"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_mistral(tmp_path_factory.mktemp("seeds") / "checkpoint", positions=CONTEXT, head_dim=32)


@pytest.fixture(scope="module", params=EXPORTS)
def artifact(request, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds") / request.param
    normistral.export_model(str(checkpoint), folder, verify=False, **EXPORTS[request.param])
    return folder


@pytest.fixture(params=[False, True], ids=["default", "exact"])
def model(request, artifact, monkeypatch):
    monkeypatch.setattr("normistral.runtime.sequence.WORTH_COPYING", 8)
    monkeypatch.setattr("normistral.server.backends.scheduler.WORTH_COPYING", 8)
    with normistral.load(artifact, exact=request.param, settings={"prefill_chunk": str(CHUNK)}) as model:
        yield model


def bits(completion):
    return completion.token_ids, completion.logprobs


def give_up(model):
    stream = model.stream([*PROMPT[:45], 9, 9], **PLAIN)
    next(stream)
    stream.close()


def draft(model):
    draft_always(model).generate(
        [*PROMPT, *PROMPT[:20], *PROMPT[:6]], temperature=0, max_new_tokens=30, ignore_eos=True
    )


def use_sessions(model, path):
    prefix = model.prefill(PROMPT[:50])
    prefix.generate(PROMPT[50:60], **PLAIN)
    prefix.save(path)
    restored = model.restore_prefix(path)
    restored.generate([8, 9], **PLAIN)


def test_the_library_computes_the_same_bits_between_other_traffic(model, tmp_path):
    chat = model.chat(system="Blåbær på brød og litt til")
    traffic = [
        lambda: None,
        lambda: model.generate([7] * 30, **PLAIN),
        lambda: model.generate([*PROMPT[:37], 8, 8, 8], **PLAIN),
        lambda: model.generate([*PROMPT, 9], **PLAIN | {"seed": 1}),
        lambda: model.generate(PROMPT, **PLAIN),
        lambda: give_up(model),
        lambda: draft(model),
        lambda: chat.send("Æ", **PLAIN),
        lambda: use_sessions(model, tmp_path / "s"),
        lambda: model.score([*PROMPT[:40], 3, 4, 5], last=20),
    ]
    first = bits(model.generate(PROMPT, **SEEDED))
    for other in traffic:
        other()
        found = model.generate(PROMPT, **SEEDED)
        assert bits(found) == first
    assert found.timings.cached_tokens % CHUNK == 0


def test_turns_and_prefixes_with_a_seed_depend_on_their_tokens_alone(model, tmp_path):
    """The second turn of a conversation, and a restored prefix, equal those of a model that computed nothing else."""

    def second_turn(**first):
        chat = model.chat(system="Vær snill")
        chat.send("Hei", **first)
        chat.replace([*chat.messages[:2], {"role": "assistant", "content": "Blåbær er blå og gode."}])
        return bits(chat.fork().send("Og?", **SEEDED))

    fresh = bits(model.prefill(PROMPT[:50]).generate(PROMPT[50:], **SEEDED))
    turn = second_turn(**SEEDED)
    assert second_turn(**PLAIN) == turn
    use_sessions(model, tmp_path / "s")
    restored = model.restore_prefix(tmp_path / "s")
    found = restored.generate(PROMPT[50:], **SEEDED)
    assert bits(found) == fresh == bits(model.generate(PROMPT, **SEEDED))
    assert found.timings.cached_tokens == 48  # three whole chunks came with the file


def test_jobs_in_turns_compute_the_same_bits(model):
    def job(name, prompt, **options):
        return Job(name, prompt, model.resolve(options), "a")

    queue = RoundRobinScheduler(model, BatchSettings("off", 8 * CONTEXT * cache_token_bytes(model.manifest), CONTEXT))
    first = bits(model.generate(PROMPT, **SEEDED))
    chunks: dict[str, list] = {}
    for number in range(6):
        queue.add(job(f"longer {number}", [*PROMPT[: 30 + 7 * number], 9], **PLAIN))
        queue.add(job(f"seeded {number}", PROMPT, **SEEDED))
        queue.add(job(f"same {number}", PROMPT, **PLAIN))
        for _ in range(9 if number % 2 else 1000):
            for job_id, chunk in queue.step():
                chunks.setdefault(job_id, []).append(chunk)
    queue.cancel("longer 5")
    while not queue.idle:
        for job_id, chunk in queue.step():
            chunks.setdefault(job_id, []).append(chunk)
    for number in range(6):
        assert bits(Completion.from_chunks(chunks[f"seeded {number}"])) == first


def test_a_cache_that_a_copy_would_round_again_is_not_canonical(artifact):
    if "openvino" not in artifact.name:
        return  # only OpenVINO shows its cache as something else than it stores
    settings = {"prefill_chunk": str(CHUNK), "KEY_CACHE_PRECISION": "u8", "KEY_CACHE_GROUP_SIZE": "16"}
    with normistral.load(artifact, settings=settings) as model:
        first = bits(model.generate(PROMPT, **SEEDED))
        for _ in range(3):
            model.generate([*PROMPT, 9], **PLAIN)
            assert bits(model.generate(PROMPT, **SEEDED)) == first


# What is reused, counted


@pytest.fixture
def scripted(tmp_path):
    model = make_base_model(tmp_path / "scripted", random_logits(VOCABULARY))
    model._backend.capabilities = dataclasses.replace(model._backend.capabilities, prefill_chunk=64)
    return model


def forwards(model, call):
    model._backend.forwarded.clear()
    call()
    return [len(fed) for fed in model._backend.forwarded]


def test_only_whole_chunks_from_the_beginning_serve_a_seed(scripted):
    prompt, options = list(range(5, 205)), {"max_new_tokens": 1, "seed": 1}
    assert forwards(scripted, lambda: scripted.generate(prompt[:150], **options)) == [64, 64, 22]
    assert forwards(scripted, lambda: scripted.generate(prompt, **options)) == [64, 8]
    assert forwards(scripted, lambda: scripted.generate(prompt, max_new_tokens=1)) == [1]
    assert forwards(scripted, lambda: scripted.generate(prompt[:192], **options)) == [64]  # its logits are needed
    other = [*prompt[:100], *[3] * 80]
    assert forwards(scripted, lambda: scripted.generate(other, max_new_tokens=1)) == [64, 16]  # from 100 on
    assert forwards(scripted, lambda: scripted.generate(other, **options)) == [64, 52]  # only 64 were whole


def test_generated_tokens_serve_no_seed(scripted):
    options = {"max_new_tokens": 80, "ignore_eos": True, "temperature": 0}
    prompt = list(range(5, 55))
    answer = scripted.generate(prompt, **options)
    longer = [*prompt, *answer.token_ids, 7]
    assert forwards(scripted, lambda: scripted.generate(longer, max_new_tokens=1, seed=1)) == [64, 64, 3]
    assert forwards(scripted, lambda: scripted.generate(longer, max_new_tokens=1)) == [1]


def test_sessions_keep_what_serves_a_seed_if_it_was_computed_the_same_way(scripted, tmp_path, monkeypatch):
    prompt, options = list(range(5, 155)), {"max_new_tokens": 1, "seed": 1}
    scripted.prefill(prompt).save(tmp_path / "s")
    restored = scripted.restore_prefix(tmp_path / "s")
    assert forwards(scripted, lambda: restored.generate([9], **options)) == [23]
    monkeypatch.setattr("normistral.runtime.sessions.describe_arithmetic", lambda capabilities: "another processor")
    restored = scripted.restore_prefix(tmp_path / "s")
    scripted.generate([3], max_new_tokens=1)  # the idle sequence holds none of it either
    scripted._sequences.clear()
    assert forwards(scripted, lambda: restored.generate([9], **options)) == [64, 64, 23]


def test_a_session_of_the_format_s_first_version_is_read_and_serves_no_seed(scripted, tmp_path, monkeypatch):
    prompt = list(range(5, 155))
    with monkeypatch.context() as patch:
        patch.setattr(sessions, "VERSION", 1)
        write = sessions.write_session
        patch.setattr(
            "normistral.runtime.sessions.write_session",
            lambda path, header, *rest: write(path, _as_version_1(header), *rest),
        )
        scripted.prefill(prompt).save(tmp_path / "s")
    scripted._sequences.clear()
    restored = scripted.restore_prefix(tmp_path / "s")
    assert forwards(scripted, lambda: restored.generate([9], max_new_tokens=1)) == [1]
    restored = scripted.restore_prefix(tmp_path / "s")
    scripted._sequences.clear()
    assert forwards(scripted, lambda: restored.generate([9], max_new_tokens=1, seed=1)) == [64, 64, 23]


def _as_version_1(header):
    """The header as that version wrote it: without the two fields."""
    import msgspec

    known = [(field.name, field.type) for field in msgspec.structs.fields(header)]
    kind = msgspec.defstruct("Header", [pair for pair in known if pair[0] not in ("canonical", "computed_by")])
    return kind(**{name: getattr(header, name) for name, _ in known if name not in ("canonical", "computed_by")})


def test_a_chat_with_a_seed_equals_its_parts(tmp_path):
    chat = make_model(tmp_path, random_logits(VOCABULARY)).chat()
    chat.send("A" * 100, seed=1, max_new_tokens=20)
    second = chat.send("Å", seed=2, max_new_tokens=5)
    assert second.timings.cached_tokens % 16 == 0
    assert second.timings.cached_tokens > 0


# What the server says


@pytest.mark.parametrize(
    ("batching", "options", "promised"),
    [("in turns", {"seed": 1}, True), ("together", {}, False), ("together", {"seed": 1}, True)],
)
def test_the_fingerprint_is_null_where_a_seed_promises_nothing(tmp_path, batching, options, promised):
    from served_models import make_served, open_served

    from normistral.server.limits import ServerLimits

    model = ServedModel.__new__(ServedModel)
    model.handler = open_served(make_served(tmp_path / "model", answers=["Hei"]), ServerLimits())
    prints = []
    for arithmetic in "aab":
        model._arithmetic, model._together = arithmetic, batching == CONTINUOUS
        prints.append(model.fingerprint(GenerationConfig(**options)))
    if promised:
        assert prints[0] == prints[1] != prints[2]
        assert prints[0].startswith("fp_")
    else:
        assert prints == [None] * 3


def test_settings_versions_and_processor_are_part_of_the_arithmetic(scripted, monkeypatch):
    from normistral.runtime.engines import base as arithmetic

    capabilities = scripted.capabilities
    named = arithmetic.describe_arithmetic(capabilities)
    assert arithmetic.describe_arithmetic(capabilities) == named
    threads = dataclasses.replace(capabilities, settings={"INFERENCE_NUM_THREADS": "3"})
    assert arithmetic.describe_arithmetic(threads) != named
    machine = arithmetic.read_machine()
    monkeypatch.setattr(arithmetic, "read_machine", lambda: dataclasses.replace(machine, cpu="another"))
    assert arithmetic.describe_arithmetic(capabilities) != named
