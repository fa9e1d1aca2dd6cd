"""Medians, intervals and the table of a comparison; it knows the document that compare.py writes and no process."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

RESAMPLES = 10_000
Document = dict[str, Any]


def ratio_interval(ours: list[float], theirs: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Ratio of the medians, and its 95 % interval by resampling repeats (percentile bootstrap).

    Args:
        ours, theirs: one figure a repeat; the same index is the same repeat, so what disturbs one disturbs both.
    """
    above, below = np.array(ours), np.array(theirs)
    drawn = np.random.default_rng(seed).integers(len(above), size=(RESAMPLES, len(above)))
    ratios = np.median(above[drawn], axis=1) / np.median(below[drawn], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(np.median(above) / np.median(below)), float(low), float(high)


def speeds(measurements: list[dict[str, Any]], prompt: int, decode: int) -> dict[str, list[float]]:
    """Tokens/s, processor time over time, and what others took of the machine, for each repeat."""
    return {
        "prefill": [prompt / one["prefill_s"] for one in measurements],
        "decode": [decode / one["decode_s"] for one in measurements],
        "first_token_s": [one["prefill_s"] for one in measurements],
        "prefill_cores": [one["prefill_cpu_s"] / one["prefill_s"] for one in measurements],
        "decode_cores": [one["decode_cpu_s"] / one["decode_s"] for one in measurements],
        "busy": [one["busy"] for one in measurements],
    }


def summarise(document: Document) -> dict[str, dict[str, Any]]:
    """Figures of each stack that was measured, by name; medians over the repeats.

    "prefill_ratio" and "decode_ratio" are the reference's speed over this one's: [ratio, low, high], over the repeats
    that both have.
    """
    prompt, decode = document["prompt_tokens"], document["decode_tokens"]
    columns = {
        name: speeds(stack["measurements"], prompt, decode)
        for name, stack in document["stacks"].items()
        if stack.get("measurements")
    }
    rows = {}
    for name, column in columns.items():
        stack = document["stacks"][name]
        row = {key: statistics.median(values) for key, values in column.items()}
        row["gb_per_s"] = row["decode"] * stack["bytes_per_token"] / 1e9
        row["bandwidth_share"] = row["gb_per_s"] / document["bandwidth"]["gb_per_s"]
        row["load_s"] = statistics.median(stack["load_s"])
        row["cold_first_token_s"] = statistics.median(stack["cold_first_token_s"])
        if reference := columns.get(document["reference"]):
            both = min(len(reference["decode"]), len(column["decode"]))
            for kind in ("prefill", "decode"):
                row[f"{kind}_ratio"] = ratio_interval(reference[kind][:both], column[kind][:both])
        rows[name] = row
    return rows


def report(document: Document) -> str:
    """Markdown."""
    machine, bandwidth, reference = document["machine"], document["bandwidth"], document["reference"]
    lines = [
        f"# {document['shape']}: the same work through several libraries, {document['date']}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, {', '.join(machine['instruction_sets'])}; "
        f"{machine['memory_gb']:.0f} GB of memory, read at **{bandwidth['gb_per_s']:.1f} GB/s** "
        f"({bandwidth['kernel']}). {document['prompt_tokens']} prompt tokens, the same for all and new in "
        f"each repeat, then {document['decode_tokens']} greedy ones; {document['repeats']} repeats in turn, medians, "
        f"tokens/s. normistral at {document['revision']}.",
        "",
        f"× is the speed of {reference} over that of the row, with the 95 % interval over repeats. GB/s is decode "
        "times the bytes of weights that a token reads; share is of the bandwidth, which was measured first. Load is "
        "that of weights, without imports; cold is the time to the first token of the first answer after it. Cores is "
        "processor time over time; busy is what everybody else took meanwhile, in cores: above a few hundredths, "
        "measure again.",
        "",
        "| stack | prefill | × | decode | × | GB/s | share | first token, s | load + cold, s "
        "| peak RSS / anonymous, GB | cores pp / tg | busy |",
        "|" + "---|" * 12,
    ]
    for name, row in summarise(document).items():
        stack = document["stacks"][name]
        cells = [name + ("" if stack["resident"] else " *")]
        for kind in ("prefill", "decode"):
            ratio = row.get(f"{kind}_ratio")
            interval = "" if ratio is None or name == reference else "{:.2f} ({:.2f}–{:.2f})".format(*ratio)
            cells += [f"{row[kind]:.{1 if kind == 'prefill' else 2}f}", interval]
        cells += [f"{row['gb_per_s']:.1f}", f"{row['bandwidth_share']:.0%}", f"{row['first_token_s']:.2f}"]
        cells.append(f"{row['load_s']:.1f} + {row['cold_first_token_s']:.2f}")
        cells.append(f"{stack['peak_resident_bytes'] / 1e9:.2f} / {stack['peak_anonymous_bytes'] / 1e9:.2f}")
        cells += [f"{row['prefill_cores']:.2f} / {row['decode_cores']:.2f}", f"{row['busy']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    if any(not stack["resident"] for stack in document["stacks"].values()):
        lines += ["", "\\* loaded anew for each repeat, for want of memory."]
    lines += ["", "| stack | library | settings |", "|---|---|---|"]
    for name, stack in document["stacks"].items():
        settings = ", ".join(f"{key}={value}" for key, value in stack.get("settings", {}).items()).replace("|", "/")
        lines.append(f"| {name} | {stack.get('library', '')} | {settings} |")
    failed = {name: stack["error"] for name, stack in document["stacks"].items() if "error" in stack}
    for name, error in failed.items():
        lines += ["", f"**{name} failed:**", "", *(f"    {line}" for line in error.splitlines())]
    return "\n".join(lines) + "\n"
