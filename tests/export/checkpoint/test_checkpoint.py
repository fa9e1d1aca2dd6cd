"""Checkpoints are checked before anything is converted: facts, damage, contradictions, hostile files."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tiny_models import END_THINK, TEMPLATE, THINK, THINKING_TEMPLATE, edit_json, make_llama, make_mistral, write_json

from normistral.artifact.manifest import ReasoningMarkers, SamplingDefaults
from normistral.artifact.presets import Preset, find_preset
from normistral.errors import CheckpointError, NormistralError, UnsupportedArchitectureError
from normistral.export.checkpoint.families import find_family, sanitise_config
from normistral.export.checkpoint.files import read_json
from normistral.export.checkpoint.locate import Located
from normistral.export.checkpoint.open import Checkpoint, hash_sources, open_checkpoint
from normistral.export.checkpoint.weights import find_weight_files, read_tensors
from normistral.files import sha256_file
from normistral.progress import NoProgress


def open_folder(folder: Path, workspace: Path, preset: Preset | None = None) -> Checkpoint:
    workspace.mkdir(exist_ok=True)
    return open_checkpoint(Located("folder", folder, folder.name, None, preset), workspace, progress=NoProgress())


def refusal(folder: Path, tmp_path: Path, kind: type[NormistralError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        open_folder(folder, Path(tempfile.mkdtemp(dir=tmp_path)))
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_mistral(tmp_path / "model", sliding_window=16, shards=3)


def test_facts_of_a_mistral_checkpoint(model: Path, tmp_path: Path) -> None:
    checkpoint = open_folder(model, tmp_path / "workspace")
    architecture = checkpoint.architecture
    assert (architecture.name, architecture.head_dim, architecture.kv_heads) == ("MistralForCausalLM", 24, 2)
    assert (architecture.sliding_window, architecture.tied_embeddings) == (16, False)
    assert checkpoint.role == "chat"
    assert checkpoint.stop_token_ids == (2, 4)  # config.json says 2, generation_config.json and the tokenizer say 4
    assert (checkpoint.context_length, checkpoint.dtype) == (64, "float32")
    assert (checkpoint.bos_token_id, checkpoint.adds_bos) == (1, False)
    assert checkpoint.template is not None
    assert (checkpoint.template.text, checkpoint.template.origin) == (TEMPLATE, "checkpoint")
    assert (checkpoint.template.bos_token, checkpoint.template.eos_token) == ("<s>", "<|im_end|>")
    assert checkpoint.sampling == SamplingDefaults(
        temperature=0.3, top_k=64, top_p=0.9, repetition_penalty=1.0, max_new_tokens=1024
    )
    assert architecture.parameters == checkpoint.weight_bytes // 4
    written = read_json(checkpoint.folder / "generation_config.json")
    assert (written["eos_token_id"], written["do_sample"]) == ([2, 4], True)


def test_sources_are_hashed(model: Path, tmp_path: Path) -> None:
    source = hash_sources(open_folder(model, tmp_path / "workspace"))
    read = {path.name: sha256_file(path) for path in model.iterdir()}
    assert source.files == read


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("safetensors", [True, False])
def test_view_loads_in_transformers(tmp_path: Path, shards: int, safetensors: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    options = {"tied": not safetensors, "dtype": "bfloat16", "adds_bos": True, "chat": False}
    folder = make_llama(tmp_path / "model", shards=shards, safetensors=safetensors, **options)
    checkpoint = open_folder(folder, tmp_path / "workspace")
    assert (checkpoint.dtype, checkpoint.role, checkpoint.adds_bos) == ("bfloat16", "base", True)
    assert checkpoint.sampling == SamplingDefaults()
    load = {"local_files_only": True, "output_loading_info": True, "trust_remote_code": False, "dtype": torch.float32}
    ours, info = AutoModelForCausalLM.from_pretrained(checkpoint.folder, **load)
    theirs, _ = AutoModelForCausalLM.from_pretrained(folder, **load)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(5, 25)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_defaults_that_config_leaves_out_are_those_of_transformers() -> None:
    from transformers import LlamaConfig, MistralConfig

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 16}
    for name, config_class in (("MistralForCausalLM", MistralConfig), ("LlamaForCausalLM", LlamaConfig)):
        clean = sanitise_config({"architectures": [name], "vocab_size": 300, **shape})
        theirs = config_class(vocab_size=300, **shape)
        for field, value in clean.items():
            if field not in ("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim"):
                assert getattr(theirs, field, None) == value, field
        assert clean["head_dim"] == 4


def test_parameters_of_the_published_shape() -> None:
    published = find_preset("7b-warm-instruct")
    assert published is not None
    config = {"architectures": ["MistralForCausalLM"], "vocab_size": 32768, "hidden_size": 4096, "head_dim": 128}
    config |= {"num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
    clean = sanitise_config(config)
    assert find_family(clean).count_parameters(clean) == published.parameters


def test_stop_token_of_the_template_alone(model: Path, tmp_path: Path) -> None:
    for file, changes in (
        ("generation_config.json", {"eos_token_id": 2}),
        ("tokenizer_config.json", {"eos_token": "</s>"}),
    ):
        edit_json(model / file, **changes)
    assert open_folder(model, tmp_path / "workspace").stop_token_ids == (2, 4)


def test_reasoning_is_marked_by_tokens_of_the_vocabulary(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "thinking", thinking=True)
    checkpoint = open_folder(folder, tmp_path / "one")
    assert checkpoint.reasoning == ReasoningMarkers("<think>", "</think>", THINK, END_THINK)
    assert "think>" not in THINKING_TEMPLATE
    assert not {THINK, END_THINK} & set(checkpoint.stop_token_ids)
    assert 2 in checkpoint.stop_token_ids
    make_added_tokens(folder, special=False)
    assert open_folder(folder, tmp_path / "two").reasoning == checkpoint.reasoning
    base = make_mistral(tmp_path / "base", thinking=True, chat=False)
    assert open_folder(base, tmp_path / "three").reasoning == checkpoint.reasoning


def test_reasoning_is_marked_in_the_template_alone(model: Path, tmp_path: Path) -> None:
    edit_json(model / "tokenizer_config.json", chat_template=TEMPLATE + "{# <think> </think> #}")
    assert open_folder(model, tmp_path / "one").reasoning == ReasoningMarkers("<think>", "</think>", None, None)


def test_reasoning_is_not_marked(model: Path, tmp_path: Path) -> None:
    assert open_folder(model, tmp_path / "one").reasoning is None
    edit_json(model / "tokenizer_config.json", chat_template=TEMPLATE + "{# </think> #}")
    assert open_folder(model, tmp_path / "two").reasoning is None
    other = make_mistral(tmp_path / "normistral-11b-thinking")  # a name says nothing
    assert open_folder(other, tmp_path / "three").reasoning is None
    thinking = make_mistral(tmp_path / "thinking", thinking=True)
    make_added_tokens(thinking, special=True, keep=("<think>",))
    assert open_folder(thinking, tmp_path / "four").reasoning is None


def make_added_tokens(folder: Path, *, special: bool, keep: tuple[str, ...] = ("<think>", "</think>")) -> None:
    """Rewrite the tags in tokenizer.json; those not kept are ordinary tokens of the vocabulary."""
    added = read_json(folder / "tokenizer.json")["added_tokens"]
    tags = [token | {"special": special} for token in added if token["content"] in keep]
    others = [token for token in added if token["content"] not in ("<think>", "</think>")]
    edit_json(folder / "tokenizer.json", added_tokens=sorted(others + tags, key=lambda token: token["id"]))
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=...)  # transformers adds what stands here only


def test_the_end_of_the_reasoning_is_no_stop_token(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "thinking", thinking=True)
    turn = "{{ '<think>' + m.reasoning_content|default('') + '</think>' + m.content + '<|im_end|>' }}"
    text = "{% for m in messages %}" + turn + "{% endfor %}"
    edit_json(folder / "tokenizer_config.json", chat_template=text)
    assert open_folder(folder, tmp_path / "workspace").stop_token_ids == (2, 4)


def test_no_stop_token_at_all(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", chat=False)
    for file in ("config.json", "generation_config.json"):
        edit_json(folder / file, eos_token_id=...)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(folder / file, eos_token=...)
    assert "no file of the checkpoint names an end-of-sequence token" in refusal(folder, tmp_path)


def test_template_from_its_own_file_and_from_a_list(model: Path, tmp_path: Path) -> None:
    edit_json(
        model / "tokenizer_config.json",
        chat_template=[{"name": "tool_use", "template": "no"}, {"name": "default", "template": "listed å"}],
    )
    first = open_folder(model, tmp_path / "one")
    (model / "chat_template.jinja").write_text("from a file æøå", encoding="utf-8")
    second = open_folder(model, tmp_path / "two")
    assert first.template is not None
    assert second.template is not None
    assert (first.template.text, second.template.text) == ("listed å", "from a file æøå")
    assert "chat_template.jinja" in {path.name for path in second.tokenizer_files}


def test_chat_preset_without_template_gets_the_built_in_one(model: Path, tmp_path: Path) -> None:
    from normistral.artifact.chat_template import CHATML

    edit_json(model / "tokenizer_config.json", chat_template=...)
    checkpoint = open_folder(model, tmp_path / "one", find_preset("7b-warm-instruct"))
    assert checkpoint.template is not None
    assert (checkpoint.template.text, checkpoint.template.origin) == (CHATML, "built-in")
    assert any("no chat template" in note for note in checkpoint.notes)
    assert open_folder(model, tmp_path / "two").role == "base"


def test_greedy_unless_the_authors_sample(model: Path, tmp_path: Path) -> None:
    edit_json(model / "generation_config.json", sample=False)
    assert open_folder(model, tmp_path / "one").sampling == SamplingDefaults(max_new_tokens=1024)
    edit_json(model / "generation_config.json", do_sample=True, temperature=..., top_k=..., top_p=...)
    sampling = open_folder(model, tmp_path / "two").sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 50, None)  # transformers' own defaults


def test_code_in_the_config_is_dropped(model: Path, tmp_path: Path) -> None:
    evil = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(model / "config.json", auto_map=evil, _attn_implementation_internal="evil/kernel")
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    (model / "evil.py").write_text("raise SystemExit('ran')")
    checkpoint = open_folder(model, tmp_path / "workspace")
    seen = (checkpoint.folder / "config.json").read_text() + (checkpoint.folder / "tokenizer_config.json").read_text()
    assert "evil" not in seen
    assert not (checkpoint.folder / "evil.py").exists()
    assert sum("auto_map" in note for note in checkpoint.notes) == 2


def test_unsupported_architecture_is_named(model: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox")
    with pytest.raises(UnsupportedArchitectureError) as caught:
        open_folder(model, tmp_path / "workspace")
    assert "'GPTNeoXForCausalLM'" in caught.value.message
    assert caught.value.hint == "supported are: MistralForCausalLM, LlamaForCausalLM, BloomForCausalLM"


def test_already_quantised(model: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised already, by gptq" in refusal(model, tmp_path)


def test_missing_shard_is_named(model: Path, tmp_path: Path) -> None:
    (model / "model-00002-of-00003.safetensors").unlink()
    assert "shard model-00002-of-00003.safetensors is missing" in refusal(model, tmp_path)


def test_no_weights_no_config_no_tokenizer(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model")
    (folder / "tokenizer.json").rename(folder / "away")
    assert "neither tokenizer.json nor tokenizer.model" in refusal(folder, tmp_path)
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(folder, tmp_path)
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder, tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1])
def test_truncated_shard(tmp_path: Path, keep: int) -> None:
    folder = make_mistral(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors" in (message := refusal(folder, tmp_path))
    assert "truncated" in message


def test_flipped_bits_in_a_header_never_pass_as_another_model(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", layers=1)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    rng = random.Random(0)
    refused = 0
    for trial in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            read_tensors(find_weight_files(folder))  # as below, before tokenizer and template are checked again
            open_folder(folder, tmp_path / f"workspace{trial}")
        except CheckpointError:
            refused += 1
        else:  # only where the header still says the same of every tensor
            (length_now,) = struct.unpack("<Q", damaged[:8])
            now = json.loads(damaged[8 : 8 + length_now])
            assert {k: v for k, v in now.items() if "meta" not in k} == {
                k: v for k, v in header.items() if k != "__metadata__"
            }
    assert refused > 100


def test_shapes_and_names_are_compared_with_the_config(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", head_dim=24)
    edit_json(folder / "config.json", head_dim=16)
    assert "q_proj.weight has shape [96, 64], but config.json asks for [64, 64]" in refusal(folder, tmp_path)
    edit_json(folder / "config.json", head_dim=24, num_hidden_layers=3)
    assert "lack model.layers.2.self_attn.q_proj.weight" in refusal(folder, tmp_path)
    edit_json(folder / "config.json", num_hidden_layers=1)
    assert "hold model.layers.1." in refusal(folder, tmp_path)


def test_missing_output_layer(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", tied=True)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert "the weights lack lm_head.weight" in refusal(folder, tmp_path)


@pytest.mark.parametrize("safetensors", [True, False])
def test_separate_output_layer_against_a_config_that_ties(tmp_path: Path, safetensors: bool) -> None:
    """transformers 4 ties then, transformers 5 does not: neither is certain to be meant."""
    folder = make_mistral(tmp_path / "model", safetensors=safetensors)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert "ties the output layer to the embedding, but the weights hold one that differs" in refusal(folder, tmp_path)


def test_copied_output_layer_stays_tied(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_mistral(tmp_path / "model", tied=True)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert open_folder(folder, tmp_path / "workspace").architecture.tied_embeddings


def test_headless_names(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from normistral.export.reference.model import load_model

    for tied in (True, False):
        folder = make_mistral(tmp_path / f"model-{tied}", tied=tied)
        edit_json(folder / "config.json", architectures=["MistralModel"])
        tensors = load_file(folder / "model.safetensors")
        bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
        checkpoint = open_folder(folder, tmp_path / f"workspace-{tied}")
        assert checkpoint.architecture.tied_embeddings is tied
        state = load_model(checkpoint, "float32").state_dict()  # transformers' own loader refuses the mixture
        expected = tensors | {"lm_head.weight": tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])}
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", vocab=270)
    donor = make_mistral(tmp_path / "donor", vocab=300)
    (donor / "tokenizer.json").replace(folder / "tokenizer.json")
    assert "ids run to 299, but config.json has vocab_size 270" in refusal(folder, tmp_path)


def test_damaged_tokenizer(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 3}}')
    assert "tokenizer.json cannot be read" in refusal(model, tmp_path)


def test_truncated_and_flipped_torch_files(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", layers=1, safetensors=False)
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    rng = random.Random(5)
    for keep in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        assert re.match("pytorch_model.bin is (empty: )?truncated", refusal(folder, tmp_path))
    refused = 0
    for trial in range(60):
        damaged = bytearray(whole)
        damaged[rng.choice((rng.randrange(2000), len(whole) - 1 - rng.randrange(3000)))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            read_tensors(find_weight_files(folder))  # as below, before tokenizer and template are checked again
            open_folder(folder, tmp_path / f"workspace{trial}")
        except CheckpointError:
            refused += 1
    assert refused > 10  # the zip format does not use every byte; none ends in a traceback


@pytest.mark.parametrize("safetensors", [True, False])
def test_reading_config_and_tensor_names_imports_no_torch(tmp_path: Path, safetensors: bool) -> None:
    model = make_mistral(tmp_path / "model", safetensors=safetensors, shards=2)
    code = (
        "import sys\n"
        "from normistral.export.checkpoint.files import read_json\n"
        "from normistral.export.checkpoint.families import find_family, sanitise_config\n"
        "from normistral.export.checkpoint.locate import locate; from normistral.progress import NoProgress\n"
        "from normistral.export.checkpoint.weights import find_weight_files, read_tensors\n"
        f"folder = locate({str(model)!r}, progress=NoProgress()).path\n"
        "config = sanitise_config(read_json(folder / 'config.json'))\n"
        "shapes = find_family(config).tensor_shapes(config)\n"
        "assert shapes.keys() == read_tensors(find_weight_files(folder)).keys()\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_eos_token_that_the_tokenizer_lacks(model: Path, tmp_path: Path) -> None:
    edit_json(model / "tokenizer_config.json", eos_token="<|eot|>")
    assert "names '<|eot|>' as eos_token" in refusal(model, tmp_path)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    import torch

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    folder = make_mistral(tmp_path / "model", safetensors=False)
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    assert "holds more than tensors" in refusal(folder, tmp_path)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    assert "pytorch_model.bin" in refusal(folder, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", 3])
def test_index_that_leads_elsewhere(model: Path, tmp_path: Path, place: object) -> None:
    index = read_json(model / "model.safetensors.index.json")
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = place
    write_json(model / "model.safetensors.index.json", index)
    assert "model.safetensors.index.json" in refusal(model, tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model-00001-of-00003.safetensors", "generation_config.json"]
)
def test_links_out_of_the_folder(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    assert f"{name} is a link that leads out" in refusal(model, tmp_path)
    (model / name).unlink()
    (model / name).symlink_to(name)  # a circle
    assert name in refusal(model, tmp_path)


def test_links_of_a_hub_cache_are_followed(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "repo/snapshots/abc", tmp_path / "repo/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in list(model.iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert open_folder(snapshot, tmp_path / "workspace").context_length == 64


NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 2**31, 2**63, 10**40, 1.5, -0.5, 1e30, float("nan"), float("inf")),
    *("", "a", "../../etc/passwd", "4096", "\ud800", "x" * 100_000, [], [1], [[1]], {}, {"a": 1}, [None], ["a", 2]),
    *({"AutoConfig": "evil.Config"}, [10**30], {"rope_type": "linear", "factor": -1}, {"type": ["x"]}),
)


def test_two_hundred_mutations_of_the_json_files(tmp_path: Path) -> None:
    """Each is refused in one line or gives a checkpoint whose facts are within the limits; nothing of it is run."""
    folder = make_mistral(tmp_path / "model", layers=1, shards=2)
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    files = ["config.json"] * 6 + [
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "model.safetensors.index.json",
    ]
    extra = ["auto_map", "rope_scaling", "quantization_config", "_attn_implementation_internal", "attention_bias"]
    rng = random.Random(20)
    refusals: list[str] = []
    opened = 0
    for trial in range(200):
        path = folder / rng.choice(files)
        original = path.read_bytes()
        document = json.loads(original)
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice([*document, *extra])
            if rng.random() < 0.1:
                document.pop(key, None)
            else:
                document[key] = rng.choice(NASTY)
        mutated = json.dumps(document).encode()
        if rng.random() < 0.1:
            mutated = rng.choice(
                (b"", b"[]", b"null", b"[" * 100_000, mutated[:-3], b"\xff\xfe", b'{"a": ' + b"9" * 9999)
            )
        path.write_bytes(mutated)
        try:
            checkpoint = open_folder(folder, tmp_path / f"workspace{trial}")
        except NormistralError as error:
            refusals.append(error.message)
        else:
            assert "evil" not in (checkpoint.folder / "config.json").read_text()
            assert checkpoint.architecture.vocabulary > max(checkpoint.stop_token_ids)
            assert 1 <= checkpoint.context_length <= 2**26
            opened += 1
        path.write_bytes(original)
    assert not (tmp_path / "ran").exists()
    assert [message for message in refusals if not message or "\n" in message or len(message) > 600] == []
    assert len(refusals) > 60
    assert opened > 30
