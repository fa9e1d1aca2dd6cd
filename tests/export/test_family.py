"""The family: every preset's tiny checkpoint, in both formats, at int8 and int4, is the same model as its checkpoint.

Each cell's figures are also printed by benchmarks/family_table.py. That no cell is green for nothing is proved in
test_family_mutations.py.
"""

from __future__ import annotations

from functools import cache

import pytest
from family_cells import FORMATS, WEIGHTS, make_cell
from tiny_family import ROWS, make_tiny, positions_of, shape_of, stops_of

import normistral
from normistral.export.checkpoint.files import read_json
from normistral.export.recipe import FUSED_CONTEXT, UNSTATED_CONTEXT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    return cache(lambda row: make_tiny(ROWS[row], folder / row))


@pytest.fixture(scope="module", params=[(row, f, w) for row in ROWS for f in FORMATS for w in WEIGHTS], ids="-".join)
def cell(request, checkpoint, tmp_path_factory):
    row, format, weights = request.param
    return ROWS[row], make_cell(checkpoint(row), tmp_path_factory.mktemp("cell") / "artifact", format, weights)


def test_logits_are_those_of_transformers_however_tokens_are_fed(cell):
    assert list(cell[1].problems()) == []


def test_the_artifact_says_what_the_checkpoint_is(cell):
    preset, made = cell
    shape, manifest = shape_of(preset), made.manifest
    found = manifest.architecture
    assert found.name == shape.architecture.replace("BloomModel", "BloomForCausalLM")
    assert found.vocabulary == shape.vocabulary
    assert found.tied_embeddings is bool(shape.tied_embeddings)
    assert found.sliding_window == (None if shape.sliding_window is None else 16)
    assert found.heads * shape.kv_heads == found.kv_heads * shape.heads
    assert found.hidden_size * shape.heads * shape.head_dim == found.heads * found.head_dim * shape.hidden_size
    assert found.positions == ("alibi" if shape.rope_theta is None else "rotary")
    assert manifest.role == preset.role
    assert (manifest.template is None) == (preset.role == "base")
    assert set(manifest.stop_token_ids) == stops_of(preset)
    assert manifest.bos_token_id == shape.bos_id
    published = read_json(made.source / "tokenizer_config.json").get("chat_template")
    assert published == (None if manifest.template is None else manifest.template.text)
    assert (manifest.reasoning is not None) == (preset.name == "11b-thinking")


def test_the_context_is_the_checkpoints_and_a_million_positions_need_no_table(cell):
    preset, made = cell
    manifest, positions = made.manifest, positions_of(preset)
    table = 0  # bytes of rotary angles
    if positions is None:
        assert manifest.context_length == UNSTATED_CONTEXT
    elif manifest.format == "openvino":
        assert manifest.context_length == positions
    else:
        assert manifest.context_length == min(positions, FUSED_CONTEXT)
        table = 4 * manifest.context_length * manifest.architecture.head_dim
    size = sum(record.size for name, record in manifest.files.items() if "token" not in name)
    assert size <= 1.5 * manifest.architecture.parameters + table + 2**20


def test_chat_models_answer_and_base_models_complete(cell):
    preset, made = cell
    options = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    with normistral.load(made.folder, exact=True) as model:
        assert model.generate("Engelsk: Hi\nBokmål:", **options).finish_reason == "length"
        if preset.role == "base":
            with pytest.raises(normistral.errors.UsageError, match="completes text"):
                model.chat()
            return
        chat = model.chat()
        chat.send("A", **options)
        before = list(chat.messages)
        answer = chat.send("B", **options)
        fresh = model.chat()
        fresh.replace(before)
        assert fresh.send("B", **options).token_ids == answer.token_ids
