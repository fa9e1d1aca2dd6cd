"""Every legal value of every sampling option is answered, by the library and by both ways to serve; NaN is an error."""

import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from test_continuous_batching import SETTINGS, export_thinking_llama, finish, job, open_exact

import normistral
from normistral.artifact.manifest import hash_files, read_manifest, write_manifest
from normistral.errors import EngineError
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.options import GenerationConfig
from normistral.runtime.sampling import Sampler
from normistral.server.app import create_app
from normistral.server.limits import ServerLimits
from normistral.server.model_handler import ModelHandler
from normistral.server.server import background_server

TINY = 5e-324
MOST_LIKELY = [{"top_p": TINY}, {"top_p": 1e-45}, {"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}, {"min_p": 1 - 1e-9}]
MOST_LIKELY += [{"temperature": 0}, {"temperature": TINY}, {"temperature": 1e-30}, {"temperature": 1e-6}]
OTHERS = [{"top_p": 1 - 1e-9}, {"top_p": 1.0}, {"top_k": 0}, {"top_k": 2**31}, {"min_p": TINY}, {"temperature": 100}]
OTHERS += [
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 100},
    {"seed": 0},
    {"seed": 2**63},
    {"temperature": 2e-6},
]
OTHERS += [{"max_tokens": 1}, {"top_p": TINY, "min_p": 1.0, "top_k": 1, "temperature": TINY, "repetition_penalty": 100}]
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return export_thinking_llama(tmp_path_factory)


@pytest.mark.parametrize("batching", ["auto", "off"])
def test_every_legal_value_is_answered_on_every_route(artifact, batching) -> None:
    handler = ModelHandler.open(
        artifact, replace(SETTINGS, batching=batching), name="m", config=EngineConfig(exact=True)
    )
    limits = ServerLimits(grace_s=0.2)
    with (
        background_server(create_app([handler], limits)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
        normistral.load(artifact, exact=True) as model,
    ):

        def ask(route: str, **fields):
            asked = {"messages": [{"role": "user", "content": "x"}]} if "chat" in route else {"prompt": PROMPT}
            body = {"model": "m", "max_tokens": 3, "temperature": 1.0, "seed": 1, **asked, **fields}
            answer = client.post(route, json=body)
            assert answer.status_code == 200, (fields, answer.text)
            return answer.json()["choices"][0]

        greedy = ask("/v1/completions", temperature=0)["text"]
        for fields in MOST_LIKELY:
            assert ask("/v1/completions", **fields)["text"] == greedy, fields
        for fields in MOST_LIKELY + OTHERS:
            for route in ("/v1/completions", "/v1/chat/completions"):
                ask(route, **fields)
            options = {"max_new_tokens" if name == "max_tokens" else name: value for name, value in fields.items()}
            assert model.generate(PROMPT, **{"max_new_tokens": 3, "temperature": 1.0, "seed": 1, **options}).token_ids


@pytest.mark.parametrize("fields", MOST_LIKELY)
def test_what_leaves_the_most_likely_token_alone_leaves_it_alone(fields) -> None:
    logits = np.random.default_rng(3).normal(0, 5, 1000).astype(np.float32)
    sampler = Sampler(GenerationConfig(**{"temperature": 1.0, "seed": 1, **fields}), [])
    assert {sampler.sample(logits) for _ in range(20)} == {int(logits.argmax())}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_the_library_s_error(artifact, tmp_path, value) -> None:
    broken = add_to_logits(artifact, tmp_path / "broken", value)
    with normistral.load(broken, exact=True) as model:
        batch = open_exact(broken)
        for name, options in enumerate(({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "seed": 1})):
            with pytest.raises(EngineError) as library:
                model.generate(PROMPT, **options)
            batch.add(job(name, PROMPT, **options))
            (error,) = finish(batch).values()
            assert (type(error), error.message, error.hint) == (EngineError, library.value.message, library.value.hint)
        batch.close()


def add_to_logits(artifact: Path, folder: Path, value: float) -> Path:
    """A copy of an artifact whose model adds a number to its logits."""
    import openvino as ov
    from openvino import opset13 as ops

    shutil.copytree(artifact, folder)
    model = ov.Core().read_model(folder / "openvino_model.xml")
    result = model.get_results()[0]
    logits = result.input_value(0)
    changed = ops.add(logits, ops.constant(np.float32(value))).output(0)
    changed.set_names(logits.get_names())
    logits.set_names(set())
    result.input(0).replace_source_output(changed)
    ov.save_model(model, folder / "changed.xml", compress_to_fp16=False)
    del model
    for suffix in ("xml", "bin"):
        (folder / f"changed.{suffix}").replace(folder / f"openvino_model.{suffix}")
    manifest = read_manifest(folder)
    (folder / "normistral.json").unlink()
    write_manifest(folder, replace(manifest, files=hash_files(folder)))
    return folder
