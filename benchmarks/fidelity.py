"""Does an artifact say what its checkpoint says? Greedy answers side by side with transformers in float32.

    python benchmarks/fidelity.py MODEL EXACT_ARTIFACT [OTHER_ARTIFACT ...] [--tokens 30] [--json FILE]

EXACT_ARTIFACT runs in exact mode and is compared token by token. Where it diverges, the reference's two best logits
at that place are compared with the noise: the largest difference between the two runs' logits over the common
tokens. The other artifacts answer at default settings, to be read side by side.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import normistral
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import open_checkpoint
from normistral.progress import NoProgress

# Chosen before anything was run with them.
PROMPTS = (
    "What is the capital of Norway?",
    "Write one sentence about the sea.",
    "What is 7 plus 5?",
    "Name three colours.",
    "Why is the sky blue?",
    "Hva heter hovedstaden i Norge?",
    "Skriv en setning om fjell.",
    "Hvor mange dager er det i en uke?",
    "Hva er en kommune?",
    "Oversett til engelsk: Jeg liker blåbærsyltetøy.",
)


class Reference:
    """The checkpoint in transformers, float32."""

    def __init__(self, model: str, workspace: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        checkpoint = open_checkpoint(locate(model, progress=NoProgress()), workspace, progress=NoProgress())
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
        self.stop_token_ids = list(checkpoint.stop_token_ids)

    def encode(self, prompt: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    def answer(self, prompt_ids: list[int], tokens: int) -> list[int]:
        import torch

        ids = torch.tensor([prompt_ids])
        mask = torch.ones_like(ids)
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=self.stop_token_ids
        )
        return [int(i) for i in out[0, len(prompt_ids) :]]

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """[len(token_ids), vocabulary]"""
        import torch

        with torch.no_grad():
            return np.asarray(self.model(torch.tensor([token_ids])).logits[0].numpy())


def compare(reference: Reference, exact: normistral.Model, prompt: str, tokens: int) -> dict[str, Any]:
    prompt_ids = reference.encode(prompt)
    chat = exact.chat()
    found = list(chat.send(prompt, temperature=0.0, max_new_tokens=tokens).token_ids)
    expected = reference.answer(prompt_ids, tokens)
    common = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(map(len, (found, expected)))
    )
    sequence = prompt_ids + expected[:common]
    theirs = reference.logits(sequence)[len(prompt_ids) - 1 :]
    engine = exact.create_sequence()
    ours = [engine.prefill(sequence[:end], lambda: False) for end in range(len(prompt_ids), len(sequence) + 1)]
    noise = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True) if a is not None)
    best = np.sort(theirs[-1])[-2:]
    same = found == expected
    return {
        "prompt": prompt,
        "same": same,
        "tokens": len(expected),
        "common": common,
        "noise": round(noise, 5),
        "gap_where_they_part": None if same else round(float(best[1] - best[0]), 5),
        "transformers": reference.tokenizer.decode(expected, skip_special_tokens=True),
        "exact": exact.tokenizer.decode(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("exact", type=Path)
    parser.add_argument("others", type=Path, nargs="*")
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as workspace:
        reference = Reference(arguments.model, Path(workspace))
        with normistral.load(arguments.exact, exact=True) as exact:
            rows = [compare(reference, exact, prompt, arguments.tokens) for prompt in PROMPTS]
    for other in arguments.others:
        with normistral.load(other) as model:
            for row in rows:
                answer = model.chat().send(row["prompt"], temperature=0.0, max_new_tokens=arguments.tokens)
                row[other.name] = answer.text
    for row in rows:
        print(json.dumps(row, ensure_ascii=False, indent=2))
    explained = sum(row["same"] or row["gap_where_they_part"] <= 2 * row["noise"] for row in rows)
    print(f"{sum(row['same'] for row in rows)} of {len(rows)} the same, {explained} the same or within the noise")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
