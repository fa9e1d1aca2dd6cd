"""One field of config.json or generation_config.json is changed to a value that changes what transformers computes.

    python tests/scripts/mutate_configs.py [COUNT] [SEED]        (make test-mutations; 120 and 0)

Each artifact has to compute what transformers does with the changed file, or the export has to be refused; none may
be certified and different. What transformers does is asked of its own loader, from_pretrained and generate, on the
folder as it stands. Changes that it does not notice do not count. Also exports every config of trainer_configs.py,
which has to go without --ignore-field. Prints one line each, and exits with 1 if one fails.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_transformers5 import run_exact

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from tiny_bloom import make_bloom
from tiny_models import edit_json, make_llama, make_mistral
from tiny_transformers5 import TOKENS
from trainer_configs import CONFIGS

import normistral
from normistral.artifact.manifest import read_manifest
from normistral.errors import NormistralError
from normistral.export.tools import quiet_tools

BOUND = 1e-3  # of the logits' spread
NEW_TOKENS = 12
PROMPT = TOKENS[:8]
RECIPES = ({"format": "onnx", "weights": "fp32", "graph": "fused"}, {"format": "openvino", "weights": "fp16"})
_REFUSALS = (ValueError, TypeError, AttributeError, RuntimeError, LookupError, OSError, ArithmeticError)
_SIZES = {"hidden": 64, "heads": 4, "dtype": "float16"}
MAKERS = {
    "mistral": lambda folder: make_mistral(folder, head_dim=16, sliding_window=16, chat=False, **_SIZES),
    "llama": lambda folder: make_llama(folder, head_dim=16, chat=False, **_SIZES),
    "bloom": lambda folder: make_bloom(folder, headless=False, tie_key=False, safetensors=True, **_SIZES),
}


@dataclass(frozen=True)
class Mutation:
    family: str
    file: str
    field: str
    value: Any


def draw(chance: random.Random) -> Mutation:
    """A change that may or may not have an effect."""
    family = chance.choice(list(MAKERS))
    if chance.random() < 0.25:
        return Mutation(family, "generation_config.json", *_draw_generation(chance))
    return Mutation(family, "config.json", *(_draw_bloom if family == "bloom" else _draw_rotary)(chance))


def _draw_rotary(chance: random.Random) -> tuple[str, Any]:
    real = chance.uniform
    pool = {
        "rope_theta": lambda: 10 ** real(1, 7),
        "rope_scaling": lambda: _draw_scaling(chance),
        "rms_norm_eps": lambda: 10 ** real(-3, -0.5),
        "hidden_act": lambda: chance.choice(
            [
                "gelu",
                "relu",
                "gelu_new",
                "gelu_pytorch_tanh",
                "quick_gelu",
                "mish",
                "tanh",
                "sigmoid",
                "relu2",
                "gelu_fast",
            ]
        ),
        "sliding_window": lambda: chance.choice([None, chance.randint(2, 40)]),
        "num_attention_heads": lambda: chance.choice([1, 2, 8]),
        "num_key_value_heads": lambda: chance.choice([None, 1, 4]),
        "head_dim": lambda: chance.choice([None, 8, 32]),
        "num_hidden_layers": lambda: chance.choice([1, 3]),
        "vocab_size": lambda: chance.randint(200, 300),
        "hidden_size": lambda: chance.choice([32, 128]),
        "intermediate_size": lambda: chance.choice([64, 256]),
        "tie_word_embeddings": lambda: True,
        "attention_bias": lambda: True,
        "mlp_bias": lambda: True,
        "partial_rotary_factor": lambda: chance.choice([0.25, 0.5]),
        "layer_types": lambda: ["full_attention", "sliding_attention"],
        "per_layer_config": lambda: {"0": {"rms_norm_eps": 0.1}},
        "is_causal": lambda: False,
        "pruned_heads": lambda: {"0": [1]},
        "architectures": lambda: chance.choice([["LlamaForCausalLM"], ["MistralForCausalLM"]]),
        "model_type": lambda: chance.choice(["llama", "mistral"]),
    }
    arithmetic = ["rope_theta", "rope_scaling", "rope_scaling", "rms_norm_eps", "hidden_act", "sliding_window"]
    field = chance.choice([*pool, *arithmetic])
    return field, pool[field]()


def _draw_scaling(chance: random.Random) -> dict[str, Any]:
    kind = chance.choice(["linear", "dynamic", "yarn", "llama3", "longrope"])
    scaling: dict[str, Any] = {"rope_type": kind, "factor": chance.uniform(1.5, 9)}
    if kind == "longrope":
        return scaling | {"short_factor": [2.0] * 8, "long_factor": [3.0] * 8}
    if kind in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = chance.choice([8, 16, 32])
    if kind == "llama3":
        return scaling | {"low_freq_factor": chance.uniform(0.5, 1.5), "high_freq_factor": chance.uniform(2, 5)}
    optional = {"attention_factor": chance.uniform(0.5, 1.5), "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}
    optional |= {"mscale": 0.7, "mscale_all_dim": 1.3}
    return scaling | {name: optional[name] for name in optional if kind == "yarn" and chance.random() < 0.4}


def _draw_bloom(chance: random.Random) -> tuple[str, Any]:
    pool = {
        "layer_norm_epsilon": lambda: 10 ** chance.uniform(-3, -1),
        "apply_residual_connection_post_layernorm": lambda: True,
        "n_head": lambda: chance.choice([1, 2, 8, 16]),
        "num_attention_heads": lambda: chance.choice([1, 2, 8]),
        "n_layer": lambda: chance.choice([1, 3]),
        "num_hidden_layers": lambda: chance.choice([1, 3]),
        "n_embed": lambda: chance.choice([32, 128]),
        "hidden_size": lambda: chance.choice([32, 128]),
        "vocab_size": lambda: chance.randint(200, 300),
        "tie_word_embeddings": lambda: True,
        "model_type": lambda: "llama",
    }
    field = chance.choice(list(pool))
    return field, pool[field]()


def _draw_generation(chance: random.Random) -> tuple[str, Any]:
    def token() -> int:
        return chance.randint(5, 260)

    pool = {
        "eos_token_id": lambda: [token() for _ in range(40)],
        "repetition_penalty": lambda: chance.uniform(1.1, 5.0),
        "no_repeat_ngram_size": lambda: chance.randint(1, 2),
        "suppress_tokens": lambda: [token() for _ in range(120)],
        "begin_suppress_tokens": lambda: [token() for _ in range(200)],
        "bad_words_ids": lambda: [[token()] for _ in range(120)],
        "forced_eos_token_id": token,
        "num_beams": lambda: chance.randint(2, 4),
        "min_new_tokens": lambda: NEW_TOKENS - 1,
        "max_new_tokens": lambda: chance.randint(1, NEW_TOKENS - 1),
        "sequence_bias": lambda: [[[token()], chance.uniform(20, 40)]],
        "guidance_scale": lambda: chance.uniform(2, 4),
        "encoder_repetition_penalty": lambda: chance.uniform(2, 9),
        "penalty_alpha": lambda: chance.uniform(0.3, 0.9),
        "exponential_decay_length_penalty": lambda: [1, 9.0],
    }
    field = chance.choice(list(pool))
    return field, pool[field]()


def try_mutation(mutation: Mutation, base: Path, scratch: Path, recipe: dict[str, Any]) -> str:
    """equal, refused, unnoticed, or DIFFERENT."""
    folder, output = scratch / "model", scratch / "artifact"
    shutil.copytree(base, folder)
    edit_json(folder / mutation.file, **{mutation.field: mutation.value})
    asked = ask_generation if mutation.file == "generation_config.json" else ask_logits
    before, expected = _unchanged(base, asked), asked(folder)
    if (
        expected is not None
        and expected.shape == before.shape
        and np.abs(expected - before).max() <= 1e-6 * np.ptp(before)
    ):
        return "unnoticed"
    try:
        manifest = normistral.export_model(str(folder), output, **recipe)
    except NormistralError as refused:
        return f"refused: {refused.message}"
    if manifest.verified != "run":
        return f"DIFFERENT: verified is {manifest.verified}"
    if expected is None:
        return "DIFFERENT: transformers refuses it"
    found = run_generation(output) if asked is ask_generation else run_exact(output, read_manifest(output))
    if found.shape != expected.shape:
        return f"DIFFERENT: {found.shape} instead of {expected.shape}"
    apart = np.abs(found - expected).max() / max(np.ptp(expected), 1e-9)
    return "equal" if apart <= BOUND else f"DIFFERENT: {apart:.2g} of the spread"


@cache
def _unchanged(base: Path, asked: Any) -> np.ndarray:
    found = asked(base)
    assert found is not None
    return found


def ask_logits(folder: Path) -> np.ndarray | None:
    """transformers' logits [tokens, vocabulary], float32; None where it refuses the folder."""
    model = _load(folder)
    try:
        with torch.inference_mode():
            return model(torch.tensor([TOKENS])).logits[0].numpy()
    except _REFUSALS:
        return None


def ask_generation(folder: Path) -> np.ndarray | None:
    """The token ids that transformers' generate adds, stop tokens left out; None where it refuses."""
    model = _load(folder)
    try:
        with torch.inference_mode():
            ids = model.generate(torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long))
    except _REFUSALS:
        return None
    stops = model.generation_config.eos_token_id
    stops = {stops} if isinstance(stops, int) else set(stops)
    new = ids[0, len(PROMPT) :].tolist()
    return np.array(new[: next((at for at, token in enumerate(new) if token in stops), len(new))])


def run_generation(artifact: Path) -> np.ndarray:
    """The same of the artifact."""
    with normistral.load(artifact, exact=True) as model:
        answer = model.generate(PROMPT)
        stops = set(model.manifest.stop_token_ids)
    new = list(answer.token_ids)
    return np.array(new[: next((at for at, token in enumerate(new) if token in stops), len(new))])


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with quiet_tools(None):
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except _REFUSALS:
        return None


def make_bases(folder: Path) -> dict[str, Path]:
    """The unchanged checkpoints."""
    bases = {family: make(folder / family) for family, make in MAKERS.items()}
    for base in bases.values():
        edit_json(base / "generation_config.json", max_new_tokens=NEW_TOKENS)
    return bases


def mutate(count: int, seed: int, recipes: tuple[dict[str, Any], ...] = RECIPES) -> Counter[str]:
    """Try changes until `count` had an effect; how many came to what."""
    chance, outcomes = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        bases = make_bases(Path(place))
        while outcomes.total() - outcomes["unnoticed"] < count:
            mutation, recipe = draw(chance), recipes[chance.randrange(len(recipes))]
            with tempfile.TemporaryDirectory(dir=place) as scratch:
                outcome = try_mutation(mutation, bases[mutation.family], Path(scratch), recipe)
            outcomes[outcome.partition(":")[0]] += 1
            shown = f"{mutation.family} {mutation.file.partition('.')[0]} {mutation.field}={mutation.value!s:.40}"
            print(f"{shown:75} {recipe['format']:8} {outcome[:110]}", flush=True)
    return outcomes


def export_trainers() -> list[str]:
    """Export every config that a training tool writes; the names of those that were refused."""
    refused = []
    for number, (name, fields) in enumerate(CONFIGS.items()):
        with tempfile.TemporaryDirectory() as scratch:
            folder = MAKERS[("mistral", "llama")[number % 2]](Path(scratch) / "model")
            edit_json(folder / "config.json", **fields)
            try:
                normistral.export_model(str(folder), Path(scratch) / "artifact", **RECIPES[number % len(RECIPES)])
                outcome = "exported"
            except NormistralError as failure:
                refused.append(name)
                outcome = f"REFUSED: {failure.message}"
        print(f"{name:40} {outcome}", flush=True)
    return refused


def main() -> None:
    given = [int(text) for text in sys.argv[1:3]]
    count, seed = (*given, *(120, 0)[len(given) :])
    outcomes = mutate(count, seed)
    print(", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items())))
    refused = export_trainers()
    print(f"{len(CONFIGS) - len(refused)} of {len(CONFIGS)} configs of training tools exported without --ignore-field")
    if outcomes["DIFFERENT"] or refused:
        sys.exit(1)


if __name__ == "__main__":
    main()
