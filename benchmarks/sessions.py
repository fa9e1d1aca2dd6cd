"""A session of a long text: computing it, saving it, restoring it in a fresh process, and the tokens afterwards.

    python benchmarks/sessions.py ARTIFACT [--tokens 2000] [--new 64] [--exact] [--json FILE]

Two processes: one computes a prefix of so many tokens, saves it and goes on; the other restores it and goes on. A third
measurement, in the first process, is what the copy for a second conversation takes. The file is read out of the page
cache, as it is right after saving.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import normistral
from normistral import hardware

FILLER = "Kommunen vedtok planen etter en lang debatt om skole, helse og veier. "
QUESTION = "\nSpørsmål: Hva vedtok kommunen?\nSvar:"


def long_text(tokens: int, model: normistral.Model) -> list[int]:
    """Exactly this many token ids."""
    return model.tokenizer.encode(FILLER * tokens)[:tokens]


def go_on(prefix: normistral.Prefix, model: normistral.Model, new: int) -> normistral.Completion:
    question = model.tokenizer.encode(QUESTION, add_special_tokens=False)
    return prefix.generate(question, max_new_tokens=new, temperature=0.0, ignore_eos=True)


def measure(artifact: Path, path: Path, tokens: int, new: int, exact: bool) -> dict[str, Any]:
    with normistral.load(artifact, exact=exact) as model:
        text = long_text(tokens, model)
        start = time.perf_counter()
        prefix = model.prefill(text)
        prefilled = time.perf_counter()
        prefix.save(path)
        saved = time.perf_counter()
        copy = model.prefill([*text, text[0]])  # the copy, and one token
        copied = time.perf_counter()
        copy.close()
        answer = go_on(prefix, model, new)
        return {
            "engine": model.capabilities.name,
            "numerics": model.capabilities.kv_cache_key,
            "tokens": len(text),
            "prefill_s": round(prefilled - start, 3),
            "save_s": round(saved - prefilled, 3),
            "file_bytes": path.stat().st_size,
            "copy_within_process_s": round(copied - saved, 3),
            "token_ids": list(answer.token_ids),
        }


def measure_restore(artifact: Path, path: Path, new: int, exact: bool) -> dict[str, Any]:
    with normistral.load(artifact, exact=exact) as model:
        start = time.perf_counter()
        prefix = model.restore_prefix(path)
        restored = time.perf_counter()
        answer = go_on(prefix, model, new)
        return {
            "restore_s": round(restored - start, 3),
            "ttft_after_restore_s": round(answer.timings.ttft_s, 3),
            "computed_tokens": answer.timings.prompt_tokens - answer.timings.cached_tokens,
            "token_ids": list(answer.token_ids),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--restore", type=Path, help=argparse.SUPPRESS)  # what the second process is given
    arguments = parser.parse_args()
    if arguments.restore:
        print(json.dumps(measure_restore(arguments.artifact, arguments.restore, arguments.new, arguments.exact)))
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # on this disk, and not in a file system in memory
        path = Path(folder, "session")
        first = measure(arguments.artifact, path, arguments.tokens, arguments.new, arguments.exact)
        command = [sys.executable, __file__, str(arguments.artifact), "--restore", str(path), "--new"]
        command += [str(arguments.new), *(["--exact"] if arguments.exact else [])]
        second = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    expected, found = first.pop("token_ids"), second.pop("token_ids")
    report = {
        "artifact": arguments.artifact.name,
        "cpu": hardware.read_machine().cpu,
        "python": platform.python_version(),
        "exact": arguments.exact,
        **first,
        **second,
        "new_tokens": len(expected),
        "same_tokens": found == expected,
    }
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if found != expected:
        raise SystemExit("the restored session went on with other tokens")


if __name__ == "__main__":
    main()
