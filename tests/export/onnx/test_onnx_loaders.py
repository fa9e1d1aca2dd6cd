"""ONNX artifacts in ORTModelForCausalLM: batches padded on the left, beams, and the same greedy tokens as ours.

The reference is transformers in float32 with the weights that the artifact holds, and products are at accuracy level 1
(set in a copy of the artifact), so that only the order of float32 sums differs. onnxruntime-genai, which needs an
environment of its own, is compared by benchmarks/loaders.py.
"""

from __future__ import annotations

import shutil
from functools import cache

import onnx
import pytest
import torch
from dequantise import dequantised
from test_onnx_plain import LLAMA3, add_biases
from tiny_bloom import make_bloom
from tiny_models import QUIRKS, edit_json, make_llama, make_mistral
from transformers import AutoModelForCausalLM

import normistral

# Of the logits' spread; as in test_engines.py over ten times what was seen (3e-7).
TOLERANCE = 5e-6
EXPORTS = {
    "int4": {"weights": "int4", "group_size": 32, "recipe": "fast"},
    "int8": {"weights": "int8"},
    "fp32-fused": {"weights": "fp32", "graph": "fused"},
    "fp32-plain": {"weights": "fp32", "graph": "plain"},
}
SIZES = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16}


def make_biased_llama(folder):
    make_llama(folder, **SIZES)
    add_biases(folder)
    edit_json(folder / "config.json", rope_scaling=LLAMA3)
    return folder


CHECKPOINTS = {
    "mistral": lambda folder: make_mistral(folder, **{**QUIRKS, "head_dim": 16}),
    "odd-head-size": lambda folder: make_mistral(folder, **QUIRKS),
    "llama-tied": lambda folder: make_llama(folder, **SIZES, tied=True),
    "llama-biases-rope": make_biased_llama,
    # transformers' own loader takes no headless names beside an output layer
    "bloom": lambda folder: make_bloom(folder, headless=False, safetensors=True, tie_key=False),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More wait for each other's spinning, with matrices as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loaders")
    return cache(lambda name: CHECKPOINTS[name](folder / name))


@pytest.fixture(scope="module")
def artifact(checkpoint, tmp_path_factory):
    """(checkpoint, export) -> the folder."""
    folder = tmp_path_factory.mktemp("loaders-artifacts")

    @cache
    def export(name, kind):
        output = folder / f"{name}-{kind}"
        normistral.export_model(str(checkpoint(name)), output, format="onnx", **EXPORTS[kind])
        return output

    return export


def open_in_optimum(folder, *, use_io_binding=False):
    import onnxruntime
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return ORTModelForCausalLM.from_pretrained(folder, use_io_binding=use_io_binding, session_options=options)


def copy_exact(folder, copy):
    """A copy of an artifact that does not round activations."""
    shutil.copytree(folder, copy)
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for entry in node.attribute:
            if entry.name == "accuracy_level":
                entry.i = 1
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    return copy


@pytest.fixture(scope="module", params=["int4", "fp32-fused"])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=["mistral", "odd-head-size", "bloom"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def exact(name, kind, artifact, tmp_path_factory):
    return copy_exact(artifact(name, kind), tmp_path_factory.mktemp("exact") / "artifact")


@pytest.fixture(scope="module")
def pair(name, kind, exact, checkpoint):
    """The model in ORTModelForCausalLM, and in transformers."""
    reference = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32, attn_implementation="eager")
    rounded = dequantised(exact)
    assert bool(rounded) == (kind == "int4")
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            if key in rounded:
                parameter.copy_(torch.from_numpy(rounded.pop(key)))
    assert not rounded
    return open_in_optimum(exact), reference


def pad_left(lengths, seed=0):
    """Random prompts of these lengths as one batch: ids and mask, [b, longest]."""
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 261, (len(lengths), max(lengths)), generator=noise)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return ids * mask, mask


def generate(model, ids, mask, tokens, beams=1):
    """New token ids [b, tokens]; nothing ends them early."""
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "num_beams": beams, "max_new_tokens": tokens, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, **options)
    assert out.shape == (len(ids), ids.shape[1] + tokens)
    return out[:, ids.shape[1] :].tolist()


def positions(mask, model):
    """As transformers counts them, from the first token that is no padding, for a model that takes any."""
    if model.config.model_type == "bloom":
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)}


def cut_positions(named, columns):
    return {name: tensor[:, columns] for name, tensor in named.items()}


# The window is 16: padding that fills it, prompts and answers that outgrow it.
BATCHES = [(20,), (5, 30), (30, 3, 17), (40, 1, 16, 24)]


@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_logits_of_a_batch_padded_on_the_left(pair, lengths):
    """Prefill, then two steps on its cache: what is computed for padding reaches no real token."""
    ours, reference = pair
    ids, mask = pad_left(lengths)
    cut = ids.shape[1] - 2
    with torch.no_grad():
        placed = positions(mask, reference)
        expected = reference(ids, attention_mask=mask, **placed).logits
        out = ours(ids[:, :cut], attention_mask=mask[:, :cut], **cut_positions(placed, slice(cut)))
        found = [out.logits]
        for end in range(cut + 1, ids.shape[1] + 1):
            out = ours(
                ids[:, end - 1 : end],
                attention_mask=mask[:, :end],
                past_key_values=out.past_key_values,
                **cut_positions(placed, slice(end - 1, end)),
            )
            found.append(out.logits)
    logits = torch.cat(found, dim=1)
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(tensor).all() for layer in out.past_key_values for tensor in layer)
    real = mask.bool()
    error = (logits - expected)[real].abs().max() / (expected[real].max() - expected[real].min())
    assert error <= TOLERANCE


@pytest.mark.parametrize("beams", [1, 3])
def test_tokens_of_a_batch_padded_on_the_left(pair, beams):
    ours, reference = pair
    ids, mask = pad_left((30, 3, 17))
    assert generate(ours, ids, mask, 15, beams) == generate(reference, ids, mask, 15, beams)


def test_io_binding_needs_the_head_size(name, exact, pair):
    """ORTModelForCausalLM takes hidden/heads for it; given the right one, it binds what it should."""
    bound = open_in_optimum(exact, use_io_binding=True)
    ids, mask = pad_left((30, 3, 17))
    if name == "odd-head-size":
        with pytest.raises(
            RuntimeError, match=r"Got invalid dimensions for output: present(?s:.*)Got: 16 Expected: 32"
        ):
            generate(bound, ids, mask, 1)
        bound.embed_size_per_head = bound.config.head_dim
    for beams in (1, 3):
        assert generate(bound, ids, mask, 15, beams) == generate(pair[0], ids, mask, 15, beams)


@pytest.mark.parametrize("stored", ["int4", "int8", "fp32-plain"])
@pytest.mark.parametrize("model", ["odd-head-size", "llama-tied", "llama-biases-rope", "bloom"])
def test_greedy_tokens_are_ours(artifact, model, stored):
    """The artifact as it is, activations rounded to int8, which other loaders do beside weights of 8 bits too."""
    folder = artifact(model, stored)
    theirs = open_in_optimum(folder)
    with normistral.load(folder, settings={"activation_bits": "8"} if stored == "int8" else None) as ours:
        for length in (1, 30):
            ids, mask = pad_left((length,), seed=length)
            answer = ours.generate(ids[0].tolist(), temperature=0.0, max_new_tokens=20, ignore_eos=True)
            assert list(answer.token_ids) == generate(theirs, ids, mask, 20)[0]
