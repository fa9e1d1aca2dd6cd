"""Greedy answers of one artifact through another loader, for comparison with ours.

    python benchmarks/loaders.py normistral|optimum|genai ARTIFACT > FILE          OpenVINO IR
    python benchmarks/loaders.py normistral ARTIFACT > OURS                        ONNX
    python benchmarks/loaders.py ort|ort-genai ARTIFACT OURS > FILE                ONNX, on the token ids in OURS
    python benchmarks/loaders.py compare OURS FILE ... [OURS FILE ...] > RESULT    of as many artifacts as there are
    python benchmarks/loaders.py tiny FOLDER                                       three random checkpoints
    python benchmarks/loaders.py family FOLDER                                     the family's 28 tiny artifacts

Each runs in an environment that has only the loader: `pip install openvino-genai` for genai, `pip install
onnxruntime-genai onnxruntime` for ort-genai. All are asked for the same arithmetic: with OpenVINO float32 and a float32
KV cache, so that kernels differ and precision does not; with ONNX what the file says, since kernels are onnxruntime's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

PROMPTS = (
    "What is the capital of Norway?",
    "Why is the sky blue?",
    "Name three colours.",
    "Hva heter hovedstaden i Norge?",
    "Skriv en setning om fjell.",
)
# Beginnings of the first prompt, to both sides of the tiny checkpoints' window of 16.
BEGINNINGS = (1, 2, 15, 16, 17, 33)
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
TOKENS = 30

Document = dict[str, Any]

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # as `import normistral` does, which is not in every environment


# OpenVINO IR: each loader tokenises the text itself


def ask_normistral(artifact: str) -> Document:
    import normistral

    if (Path(artifact) / "model.onnx").exists():
        return ask_normistral_ids(artifact)
    options = {"temperature": 0.0, "repetition_penalty": 1.0, "max_new_tokens": TOKENS, "draft": "off"}
    with normistral.load(artifact, exact=True) as model:
        is_base = model.manifest.template is None
        sent = [model.generate(p, **options) if is_base else model.chat().send(p, **options) for p in PROMPTS]
    return {"prompts": PROMPTS, "answers": [list(answer.token_ids) for answer in sent]}


def ask_optimum(artifact: str) -> Document:
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact)
    model = OVModelForCausalLM.from_pretrained(artifact, ov_config=EXACT)
    answers = []
    for prompt in PROMPTS:
        if tokenizer.chat_template is None:
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            messages = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        out = model.generate(**inputs, do_sample=False, repetition_penalty=1.0, max_new_tokens=TOKENS)
        answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return {"prompts": PROMPTS, "answers": answers}


def ask_genai(artifact: str) -> Document:
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(artifact, "CPU", **EXACT)
    tokenizer = pipeline.get_tokenizer()
    config = pipeline.get_generation_config()
    config.do_sample = False
    config.repetition_penalty = 1.0
    config.max_new_tokens = TOKENS
    answers = []
    for prompt in PROMPTS:
        inputs = tokenizer.encode(prompt)
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
            inputs = tokenizer.encode(text, add_special_tokens=False)
        answers.append([int(i) for i in pipeline.generate(inputs, config).tokens[0]])
    return {"prompts": PROMPTS, "answers": answers}


# ONNX: all get the same token ids, since onnxruntime-genai's own tokenizer is not what is compared


def ask_normistral_ids(artifact: str) -> Document:
    from transformers import AutoTokenizer

    import normistral

    tokenizer = AutoTokenizer.from_pretrained(artifact)
    if tokenizer.chat_template is None:
        prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    else:
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    prompts += [prompts[0][:length] for length in BEGINNINGS if length < len(prompts[0])]
    options = {"temperature": 0.0, "repetition_penalty": 1.0, "max_new_tokens": TOKENS, "draft": "off"}
    answers = []
    for prompt in prompts:
        # Loaded anew, so that no beginning comes from the last prompt's cache: computed in other steps, it is rounded
        # otherwise where products round activations to int8.
        with normistral.load(artifact) as model:
            answers.append(list(model.generate(prompt, **options).token_ids))
            stops = list(model.manifest.stop_token_ids)
    return {"prompts": prompts, "answers": answers, "stop_token_ids": stops}


def ask_ort(artifact: str, ours: Document) -> Document:
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(artifact, use_io_binding=False)
    options = {"do_sample": False, "max_new_tokens": TOKENS, "eos_token_id": ours["stop_token_ids"]}
    answers = []
    for prompt in ours["prompts"]:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=1.0, **options)
        answers.append(out[0, len(prompt) :].tolist())
    return {"prompts": ours["prompts"], "answers": answers}


def ask_ort_genai(artifact: str, ours: Document) -> Document:
    import onnxruntime_genai

    model = onnxruntime_genai.Model(artifact)
    answers = []
    for prompt in ours["prompts"]:
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + TOKENS, repetition_penalty=1.0)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        answers.append([int(i) for i in generator.get_sequence(0)[len(prompt) :]])
    return {"prompts": ours["prompts"], "answers": answers}


def make_tiny(folder: Path) -> None:
    """A window of 16 and an odd head size; a tied output layer; biases and scaled rotary angles."""
    sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / folder) for folder in ("helpers", "export/onnx")]
    from test_onnx_plain import LLAMA3, add_biases
    from tiny_models import edit_json, make_llama, make_mistral

    sizes = {"positions": 256, "heads": 4, "kv_heads": 2}
    make_mistral(folder / "mistral", **sizes, head_dim=32, sliding_window=16)
    make_llama(folder / "llama-tied", **sizes, head_dim=16, tied=True)
    biased = make_llama(folder / "llama-biases", **sizes, head_dim=16)
    add_biases(biased)
    edit_json(biased / "config.json", rope_scaling=LLAMA3)


def make_family(folder: Path) -> None:
    """Every preset's tiny random checkpoint (tiny_family.py), exported in both formats at int8 and int4."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    from family_cells import FORMATS, WEIGHTS
    from tiny_family import ROWS, make_tiny

    import normistral

    for row, preset in ROWS.items():
        given = make_tiny(preset, folder / "checkpoints" / row)
        for format in FORMATS:
            for weights in WEIGHTS:
                normistral.export_model(str(given), folder / f"{row}-{format}-{weights}", format, weights)


# Comparison


def compare(files: list[str]) -> int:
    """Print, as JSON, where answers part from ours for the same artifact; 1 if any does."""
    documents = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    rows = []
    for _, group in groupby(documents, key=lambda document: document["artifact"]):
        ours, *others = group
        rows += [compare_with(ours, theirs) for theirs in others]
    for row in rows:
        print("{artifact}: {loader} gives {same} of {prompts} answers as ours".format(**row), file=sys.stderr)
    print(json.dumps(rows, indent=1))
    return int(any(row["same"] < row["prompts"] for row in rows))


def compare_with(ours: Document, theirs: Document) -> Document:
    """How many answers are the same, and for each that is not, its prompt's index and the first token that differs."""
    parted = [
        {"prompt": index, "token": token}
        for index, token in enumerate(partings(ours["answers"], theirs["answers"]))
        if token is not None
    ]
    return {
        "artifact": ours["artifact"],
        "loader": theirs["loader"],
        "versions": ours["versions"] | theirs["versions"],
        "prompts": len(ours["prompts"]),
        "prompt_tokens": [len(prompt) for prompt in ours["prompts"] if isinstance(prompt, list)],  # known for ONNX
        "answer_tokens": [len(answer) for answer in ours["answers"]],
        "same": len(ours["prompts"]) - len(parted),
        "parted": parted,
    }


def partings(ours: list[list[int]], theirs: list[list[int]]) -> Iterator[int | None]:
    for left, right in zip(ours, theirs, strict=True):
        common = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
        # Loaders differ in whether they return the stop token itself.
        same = common is None and abs(len(left) - len(right)) <= 1
        yield None if same else min(len(left), len(right)) if common is None else common


def versions() -> dict[str, str]:
    """Of the packages that compute, those that are here."""
    from importlib.metadata import distributions

    known = ("normistral", "onnxruntime", "onnxruntime-genai", "openvino", "openvino-genai", "optimum-intel")
    names = {distribution.metadata["Name"].lower(): distribution.version for distribution in distributions()}
    return {name: names[name] for name in (*known, "optimum-onnx", "transformers") if name in names}


def main() -> int:
    command, *rest = sys.argv[1:] or ["help"]
    on_text: dict[str, Callable[[str], Document]] = {
        "normistral": ask_normistral,
        "optimum": ask_optimum,
        "genai": ask_genai,
    }
    on_ids: dict[str, Callable[[str, Document], Document]] = {"ort": ask_ort, "ort-genai": ask_ort_genai}
    if command == "compare" and len(rest) >= 2:
        return compare(rest)
    makers: dict[str, Callable[[Path], None]] = {"tiny": make_tiny, "family": make_family}
    if command in makers and len(rest) == 1:
        makers[command](Path(rest[0]))
        return 0
    if command in on_text and len(rest) == 1:
        document = on_text[command](rest[0])
    elif command in on_ids and len(rest) == 2:
        document = on_ids[command](rest[0], json.loads(Path(rest[1]).read_text(encoding="utf-8")))
    else:
        print(__doc__)
        return 2
    about = {"loader": command, "artifact": Path(rest[0]).resolve().name, "versions": versions()}
    print(json.dumps(about | document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
