"""Greedy answers of one artifact through another loader, for comparison with ours.

    python benchmarks/loaders.py normistral|optimum|genai ARTIFACT > FILE     (each in its environment)
    python benchmarks/loaders.py compare FILE FILE ...

Runs in an environment that has only the loader: `pip install openvino-genai` for genai. All are asked for float32
arithmetic and KV cache, so kernels differ and precision does not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PROMPTS = (
    "What is the capital of Norway?",
    "Why is the sky blue?",
    "Name three colours.",
    "Hva heter hovedstaden i Norge?",
    "Skriv en setning om fjell.",
)
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
TOKENS = 30


def ask_normistral(artifact: str) -> list[list[int]]:
    import normistral

    with normistral.load(artifact, exact=True) as model:
        return [list(model.chat().send(prompt, temperature=0.0, max_new_tokens=TOKENS).token_ids) for prompt in PROMPTS]


def ask_optimum(artifact: str) -> list[list[int]]:
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact)
    model = OVModelForCausalLM.from_pretrained(artifact, ov_config=EXACT)
    answers = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def ask_genai(artifact: str) -> list[list[int]]:
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(artifact, "CPU", **EXACT)
    tokenizer = pipeline.get_tokenizer()
    config = pipeline.get_generation_config()
    config.do_sample = False
    config.max_new_tokens = TOKENS
    answers = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        inputs = tokenizer.encode(text, add_special_tokens=False)
        answers.append([int(i) for i in pipeline.generate(inputs, config).tokens[0]])
    return answers


def compare(files: list[str]) -> int:
    """Print where each file's answers part from the first one's; 1 if any does."""
    first, *others = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    parted = 0
    for other in others:
        for prompt, ours, theirs in zip(PROMPTS, first["answers"], other["answers"], strict=True):
            # Loaders differ in whether they return the stop token itself.
            common = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            same = common is None and abs(len(ours) - len(theirs)) <= 1
            parted += not same
            state = "same" if same else f"parts at token {common}"
            print(f"{first['loader']} / {other['loader']}: {state} ({len(ours)}/{len(theirs)} tokens): {prompt}")
    return min(parted, 1)


def main() -> int:
    loader, *rest = sys.argv[1:] or ["help"]
    asks = {"normistral": ask_normistral, "optimum": ask_optimum, "genai": ask_genai}
    if loader == "compare" and len(rest) >= 2:
        return compare(rest)
    if loader not in asks or len(rest) != 1:
        print(__doc__)
        return 2
    print(json.dumps({"loader": loader, "answers": asks[loader](rest[0])}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
