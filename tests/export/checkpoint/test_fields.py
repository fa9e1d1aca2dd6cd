"""Every field of a checkpoint is used, without effect, or refused; transformers 5 writes the same model."""

import inspect
import json
from pathlib import Path

import fields_page
import numpy as np
import pytest
from compare_transformers5 import run_exact
from tiny_bloom import make_bloom
from tiny_gguf import byte_level_vocabulary, write_gguf
from tiny_models import edit_json, make_llama, make_mistral
from tiny_transformers5 import CASES, STORED, make_stored, stored_logits
from trainer_configs import CONFIGS, GENERATION
from typer.testing import CliRunner

import normistral
from normistral.artifact.manifest import read_manifest
from normistral.errors import CheckpointError, ExportError, UsageError
from normistral.export.checkpoint.config_fields import known_fields
from normistral.export.checkpoint.families import FAMILIES, sanitise_config
from normistral.export.checkpoint.fields import check_fields
from normistral.export.checkpoint.files import read_json
from normistral.export.checkpoint.generation_config import GENERATION_FIELDS
from normistral.export.checkpoint.gguf import GGUF_FIELDS, known_keys
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import open_checkpoint
from normistral.progress import NoProgress

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
FAST = {"format": "onnx", "weights": "fp32", "graph": "fused"}


def refusal(folder: Path, tmp_path: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_model(folder, tmp_path, **options)
    return f"{caught.value.message} | {caught.value.hint}"


def open_model(folder: Path, tmp_path: Path, **options):
    workspace = tmp_path / f"workspace-{len(list(tmp_path.iterdir()))}"
    workspace.mkdir()
    return open_checkpoint(locate(str(folder), progress=NoProgress()), workspace, progress=NoProgress(), **options)


def test_every_field_of_transformers_4_and_5_is_classified():
    import transformers

    five = json.loads((STORED / "fields.json").read_text())
    shared = set(inspect.signature(transformers.PretrainedConfig.__init__).parameters) - {"self", "kwargs"}
    for family in FAMILIES:
        config = getattr(transformers, f"{family.model_type.title()}Config")
        own = set(inspect.signature(config.__init__).parameters) - {"self", "kwargs"}
        known = known_fields(family.fields, {}).keys()
        assert not (shared | own | config().to_dict().keys()) - known
        assert not set(five[family.model_type]) - known
    assert not vars(transformers.GenerationConfig()).keys() - GENERATION_FIELDS.keys()
    assert not set(five["generation"]) - GENERATION_FIELDS.keys()


def test_every_key_of_gguf_is_classified():
    for name in fields_page.model_keys():
        if name not in GGUF_FIELDS:
            with pytest.raises(CheckpointError, match="is unknown here"):
                check_fields({name: 1}, known_keys({name: 1}), "model.gguf")


def test_the_page_is_made_from_the_tables():
    assert Path("docs/fields.md").read_text(encoding="utf-8") == fields_page.render()


def test_an_unknown_field_is_refused_by_name_or_ignored_knowingly(tmp_path):
    folder = make_mistral(tmp_path / "model", head_dim=16)
    edit_json(folder / "config.json", mystery=3)
    said = refusal(folder, tmp_path)
    assert "config.json: the field mystery is unknown here and may change what the model computes" in said
    assert "--ignore-field mystery" in said
    made = normistral.export_model(str(folder), tmp_path / "out", ignore_fields=["mystery"], **FAST)
    assert made.ignored_fields == ("mystery",)
    assert made.verified == "run"
    assert read_manifest(tmp_path / "out") == made
    from normistral.cli import build_app

    shown = CliRunner().invoke(build_app(), ["info", str(tmp_path / "out")]).output
    assert "ignored as asked: mystery" in " ".join(shown.split())


def test_a_field_that_is_not_there_or_is_read_cannot_be_ignored(tmp_path):
    folder = make_mistral(tmp_path / "model")
    for name, message in (("nothing", "has no such field"), ("rope_theta", "this field is read and cannot be ignored")):
        with pytest.raises(UsageError, match=message):
            open_model(folder, tmp_path, ignore_fields=[name])


def test_fields_inside_others_and_of_other_files(tmp_path):
    folder = make_llama(tmp_path / "model")
    edit_json(folder / "config.json", rope_theta=..., rope_parameters=YARN | {"mystery": 1})
    edit_json(folder / "generation_config.json", no_repeat_ngram_size=3)
    assert "the field rope_parameters.mystery is unknown" in refusal(folder, tmp_path)
    assert "generation_config.json: no_repeat_ngram_size is 3, which changes" in refusal(
        folder, tmp_path, ignore_fields=["rope_parameters.mystery"]
    )
    names = ("rope_parameters.mystery", "no_repeat_ngram_size")
    checkpoint = open_model(folder, tmp_path, ignore_fields=names)
    assert checkpoint.ignored_fields == names
    assert checkpoint.config["rope_theta"] == 1e6


REFUSED = {
    "a value with an effect": ({"logits_scaling": 8.0}, "logits_scaling is 8.0, which changes what the model computes"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "layers of two kinds": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    "attention both ways": ({"is_causal": False}, "is_causal is False"),
    "a window in a Llama": ({"sliding_window": 16}, "sliding_window is 16"),
    "layers of their own": ({"per_layer_config": {"0": {"rms_norm_eps": 1.0}}}, "per_layer_config is"),
    "positions by layer": (
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}},
        "rope_parameters gives layers positions of their own ('full_attention', 'sliding_attention')",
    ),
    "two bases": (
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        "contradicts itself about rope_theta",
    ),
    "two scalings": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": YARN | {"rope_theta": 1e4}},
        "contradicts itself about the scaling",
    ),
    "two types": ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "of type linear and yarn"),
    "longrope": ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "of type 'longrope' is not"),
    "su": ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling of type 'su' is not supported"),
    "a part, inside": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "rope_parameters.part",
    ),
    "a trained length elsewhere": (
        {"rope_theta": ..., "rope_parameters": YARN, "original_max_position_embeddings": 32},
        "original_max_position_embeddings is 32",
    ),
    "a text model inside": ({"text_config": {"rope_theta": 5.0}}, "is a model of text and images"),
    "forced tokens in config.json": ({"forced_eos_token_id": 7}, "config.json: forced_eos_token_id is 7"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_model_is_refused_by_name(name, tmp_path):
    changes, message = REFUSED[name]
    folder = make_llama(tmp_path / "model")
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", **changes)
    assert message in refusal(folder, tmp_path)


def test_the_window_of_a_mistral_has_to_agree_with_what_others_call_it(tmp_path):
    folder = make_mistral(tmp_path / "model", sliding_window=16)
    edit_json(folder / "config.json", use_sliding_window=True, layer_types=["sliding_attention"] * 2)
    open_model(folder, tmp_path)
    edit_json(folder / "config.json", use_sliding_window=False)
    assert "use_sliding_window is False" in refusal(folder, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_transformers_5_is_the_same_model_in_onnx(name, tmp_path):
    _compare(name, tmp_path, FAST)


@pytest.mark.parametrize("name", ["mistral-theta", "llama-llama3", "mistral-yarn"])
def test_a_checkpoint_of_transformers_5_is_the_same_model_in_openvino(name, tmp_path):
    _compare(name, tmp_path, {"format": "openvino", "weights": "fp16"})


def _compare(name, tmp_path, recipe):
    manifest = normistral.export_model(str(make_stored(tmp_path / "model", name)), tmp_path / "out", **recipe)
    assert manifest.verified == "run"
    expected = stored_logits(name)
    found = run_exact(tmp_path / "out", manifest)[-len(expected) :]
    assert np.abs(found - expected).max() <= 1e-3 * np.ptp(expected)


@pytest.mark.parametrize("recipe", [FAST, FAST | {"graph": "plain"}, {"format": "openvino", "weights": "fp16"}])
def test_the_proof_sees_what_the_reader_drops(recipe, tmp_path, monkeypatch):
    """The reader before transformers 5 was known: rope_parameters is dropped, and the cleaned file says 10000."""
    monkeypatch.setattr(
        "normistral.export.checkpoint.families.llama.read_rope",
        lambda config: {"rope_theta": 1e4, "rope_scaling": None},
    )
    folder = make_stored(tmp_path / "model", "mistral-theta")
    message = r"the artifact turns positions by other angles .* frequency 7 is 0\.0003162 instead of 5\.6"
    with pytest.raises(ExportError, match=message):
        normistral.export_model(str(folder), tmp_path / "out", **recipe)


@pytest.mark.parametrize(("field", "value"), [("rms_norm_eps", 0.05), ("hidden_act", "relu"), ("sliding_window", None)])
def test_the_reference_is_made_from_the_file_and_not_from_what_the_reader_made_of_it(
    field, value, tmp_path, monkeypatch
):
    from normistral.export.checkpoint.families import llama

    read = llama._read_shared
    if field == "sliding_window":
        monkeypatch.setattr(llama, "read_integer", _without_window(llama.read_integer))
    else:
        monkeypatch.setattr(llama, "_read_shared", lambda *given, **named: read(*given, **named) | {field: value})
    folder = make_mistral(tmp_path / "model", head_dim=16, sliding_window=16)
    with pytest.raises(ExportError, match=r"does not compute what|attention reaches None tokens back"):
        normistral.export_model(str(folder), tmp_path / "out", **FAST)


def _without_window(read):
    return lambda config, name, *rest: None if name == "sliding_window" else read(config, name, *rest)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_trainers_leave_is_let_through(name):
    shape = {
        "vocab_size": 261,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 9,
    }
    for kind in ("Mistral", "Llama"):
        config = {"architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower(), **shape}
        assert sanitise_config(config | CONFIGS[name])["hidden_size"] == 64


def test_what_trainers_leave_behind_is_exported(tmp_path):
    folder = make_llama(tmp_path / "model", head_dim=16)
    for name in ("unsloth", "transformers 4.28 defaults", "attention chosen", "transformers.js", "tokenizer's"):
        edit_json(folder / "config.json", **CONFIGS[name])
    for fields in GENERATION.values():
        check_fields(fields, GENERATION_FIELDS, "generation_config.json")
    edit_json(folder / "generation_config.json", **GENERATION["all defaults"])
    assert normistral.export_model(str(folder), tmp_path / "out", **FAST).ignored_fields == ()


def test_bloom_as_it_was_first_published(tmp_path):
    folder = make_bloom(tmp_path / "model", headless=False, tie_key=False, safetensors=True)
    edit_json(
        folder / "config.json",
        **{"pretraining_tp": 4, "slow_but_exact": False, "attention_softmax_in_fp32": True, "offset_alibi": 100},
        **{"bias_dropout_fusion": True, "masked_softmax_fusion": True, "skip_bias_add": True, "n_inner": None},
    )
    open_model(folder, tmp_path)
    edit_json(folder / "config.json", n_inner=100)
    assert "n_inner is 100" in refusal(folder, tmp_path)


def test_settings_of_generation_in_config_json_count_where_there_is_no_other_file(tmp_path):
    folder = make_llama(tmp_path / "model")
    edit_json(folder / "config.json", do_sample=True, temperature=0.7)
    assert open_model(folder, tmp_path).sampling.temperature == 0.3
    (folder / "generation_config.json").unlink()
    assert open_model(folder, tmp_path).sampling.temperature == 0.7


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.mystery", 1, "the field llama.mystery is unknown here"),
        ("llama.expert_count", 8, "llama.expert_count is 8"),
        ("llama.logit_scale", 0.5, "llama.logit_scale is 0.5"),
        ("llama.attention.scale", 0.5, "llama.attention.scale is 0.5"),
        ("llama.rope.scaling.type", "yarn", "scaled rotary positions"),
        ("llama.rope.scaling.attn_factor", 0.5, "attn_factor is 0.5"),
        ("llama.final_logit_softcapping", 30.0, "softcapping is 30.0"),
        ("tokenizer.ggml.remove_extra_whitespaces", True, "remove_extra_whitespaces is True"),
        ("tokenizer.ggml.add_sep_token", True, "add_sep_token is True"),
        ("general.sampling.mirostat", 2, "general.sampling.mirostat is 2"),
        ("general.sampling.mystery", 2, "the field general.sampling.mystery is unknown here"),
        ("general.type", "adapter", "is of the type 'adapter', not a model"),
        ("llama.context_length", None, "has no llama.context_length, without which llama.cpp loads no file"),
        ("llama.block_count", None, "has no llama.block_count"),
        ("llama.attention.layer_norm_rms_epsilon", None, "has no llama.attention.layer_norm_rms_epsilon"),
    ],
)
def test_keys_of_gguf_that_change_the_model_are_refused(key, value, message, tmp_path):
    folder = make_llama(tmp_path / "model")
    path = write_gguf(tmp_path / "model.gguf", folder, byte_level_vocabulary(folder), extra={key: value})
    with pytest.raises(normistral.NormistralError) as caught:
        open_model(path, tmp_path)
    assert message in caught.value.message


def test_a_gguf_file_is_called_by_its_name_and_no_token_is_none(tmp_path):
    folder = make_llama(tmp_path / "model")
    vocabulary = byte_level_vocabulary(folder)
    vocabulary["tokens"] = [*vocabulary["tokens"][:-1], "ĠĠ"]  # its one merge
    path = write_gguf(tmp_path / "model.gguf", folder, vocabulary, extra={"tokenizer.ggml.padding_token_id": 2**32 - 1})
    assert open_model(path, tmp_path).config["pad_token_id"] is None
    path = write_gguf(tmp_path / "wrong.gguf", folder, vocabulary, extra={"tokenizer.ggml.padding_token_id": 999})
    said = refusal(path, tmp_path)
    assert "wrong.gguf: pad_token_id is 999" in said
    assert "config.json" not in said


def test_linear_scaling_of_gguf_is_read_also_where_only_the_factor_is_given(tmp_path):
    """llama.cpp takes a factor without a type as linear."""
    folder = make_llama(tmp_path / "model")
    vocabulary = byte_level_vocabulary(folder)
    vocabulary["tokens"] = [*vocabulary["tokens"][:-1], "ĠĠ"]  # its one merge
    for extra in ({}, {"llama.rope.scaling.type": "linear"}):
        extra |= {"llama.rope.scaling.factor": 4.0}
        path = write_gguf(tmp_path / f"{len(extra)}.gguf", folder, vocabulary, extra=extra)
        config = read_json(open_model(path, tmp_path).folder / "config.json")
        assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_a_repetition_penalty_counts_in_greedy_decoding_too(tmp_path):
    """transformers' generate applies it whether it samples or not."""
    folder = make_llama(tmp_path / "model")
    edit_json(folder / "generation_config.json", sample=..., repetition_penalty=1.3)
    sampling = open_model(folder, tmp_path).sampling
    assert (sampling.temperature, sampling.repetition_penalty) == (None, 1.3)
