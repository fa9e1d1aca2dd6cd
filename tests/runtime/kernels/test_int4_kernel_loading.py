"""Our int4 kernel where many answers are computed together, and the weights that models of one artifact share."""

from __future__ import annotations

import gc

import openvino as ov
import pytest

import normistral
from normistral.errors import UsageError
from normistral.runtime.engines.openvino import MODEL_FILE, pack_for_our_kernel
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.kernels.openvino_int4 import PackedWeights, replace_products
from normistral.runtime.options import GenerationConfig
from normistral.runtime.structured.structure import Structure
from normistral.server.backends.base import BatchSettings, Job
from normistral.server.backends.create import create_backend

OURS = {"int4_kernel": "normistral"}
SETTINGS = BatchSettings("auto", 2**27, 512, slots=4)
BEGINNINGS = ("The capital of Norway is", "The capital of France is", "One, two, three, four,")


def pack(folder):
    """The weights of an artifact, as a load makes them."""
    return pack_for_our_kernel(ov.Core().read_model(folder / MODEL_FILE), folder / MODEL_FILE, required=True)


def held():
    """How many models' weights are there in the kernel's layout."""
    gc.collect()
    return sum(type(one) is PackedWeights for one in gc.get_objects())


def answer(batch, jobs):
    """The texts of these jobs, computed together."""
    for job in jobs:
        batch.add(job)
    texts = {job.job_id: "" for job in jobs}
    while not batch.idle:
        for job_id, chunk in batch.step():
            texts[job_id] += chunk.text
    return list(texts.values())


def test_answers_computed_together_use_it_and_are_the_librarys(tiny_int4, int4_library):
    with normistral.load(tiny_int4) as model:
        prompts = [model.encode(text) for text in BEGINNINGS]
        alone = [model.generate(ids, max_new_tokens=3, temperature=0.0, draft="off").text for ids in prompts]
    opened = create_backend(tiny_int4, SETTINGS, EngineConfig())
    config = GenerationConfig(max_new_tokens=3, temperature=0.0)
    together = answer(opened.batch, [Job(str(at), ids, config, "somebody") for at, ids in enumerate(prompts)])
    opened.batch.close()
    assert (
        opened.capabilities.settings["int4_kernel"] == opened.capabilities.kv_cache_key["int4_kernel"] == "normistral"
    )
    assert together == alone


def test_asked_for_where_it_is_not_there_it_is_an_error(tiny_int4, tmp_path, monkeypatch, no_packaged_kernel):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="int4_kernel cannot be normistral"):
        create_backend(tiny_int4, SETTINGS, EngineConfig(settings=OURS))
    opened = create_backend(tiny_int4, SETTINGS, EngineConfig())
    opened.batch.close()
    assert opened.capabilities.settings["int4_kernel"] == "openvino"


def test_structured_answers_use_the_same_weights(tiny_int4, int4_library):
    assert held() == 0
    created = create_backend(tiny_int4, SETTINGS, EngineConfig())
    structured = GenerationConfig(max_new_tokens=8, structure=Structure.choice(["Oslo", "Bergen"]))
    plain = GenerationConfig(max_new_tokens=8)
    jobs = [Job("a", [1, 2, 3], structured, "somebody"), Job("b", [1, 2, 3], plain, "somebody")]
    text, _ = answer(created.batch, jobs)
    assert text in ("Oslo", "Bergen")
    assert held() == 1
    created.batch.close()
    assert held() == 0


def test_weights_are_held_once_and_forgotten_with_the_last_model(tiny_int4, int4_library):
    first, second = pack(tiny_int4), pack(tiny_int4)
    assert first is second
    core = ov.Core()
    model = core.read_model(tiny_int4 / MODEL_FILE)
    replace_products(core, model, first)
    numbers = set(first.numbers.values())
    del first, second
    gc.collect()
    with pytest.raises(RuntimeError, match="not held in this process"):
        model.validate_nodes_and_infer_types()
    assert not numbers & set(pack(tiny_int4).numbers.values())


def test_an_artifact_that_was_replaced_is_packed_anew(tiny_checkpoint, tmp_path, int4_library):
    artifact = tmp_path / "artifact"
    normistral.export_model(str(tiny_checkpoint), artifact, weights="int4", group_size=32, recipe="fast", verify=False)
    before = pack(artifact)
    normistral.export_model(
        str(tiny_checkpoint), artifact, weights="int4", group_size=32, recipe="fast", verify=False, force=True
    )
    assert pack(artifact) is not before
