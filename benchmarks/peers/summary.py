"""Medians, intervals and tables of a comparison, from the lines that compare.py writes; it knows no process.

python benchmarks/peers/summary.py FILE.jsonl [STACK]      the report, in Markdown; STACK is the reference
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from normistral.evaluation.bench.machine import is_steady

RESAMPLES = 10_000
APART = 1.25  # phases of a memory whose means are nearer than this are one
REFERENCE = "normistral OpenVINO"
Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Its lines, but for those that a killed run left unfinished."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def measurements(records: Iterable[Record]) -> list[Record]:
    """Those that nothing disturbed: one for each stack, length and round."""
    return [record for record in records if record["kind"] == "measurement"]


def split_phases(bandwidths: Sequence[float]) -> float | None:
    """The bandwidth that parts a slow phase of the memory from a fast one, None if there is one phase: two means in
    logarithms, with the least squares within.
    """
    logs = np.log(np.sort(bandwidths))
    cuts = range(1, len(logs))
    if not cuts:
        return None
    within = [logs[:cut].var() * cut + logs[cut:].var() * (len(logs) - cut) for cut in cuts]
    cut = cuts[int(np.argmin(within))]
    if logs[cut:].mean() - logs[:cut].mean() < np.log(APART):
        return None
    return float(np.exp((logs[cut - 1] + logs[cut]) / 2))


def decodes(record: Record) -> list[Record]:
    """The segments of a measurement: tokens/s, GB/s of the memory around it and if that stood still, and the share of
    it that weights and KV cache took.
    """
    found = []
    for number, segment in enumerate(record["segments"]):
        before, after = record["bandwidth_gb_per_s"][number : number + 2]
        tokens, memory = record["decode_tokens"], (before + after) / 2
        context = record["length"] + tokens * (number + 0.5)
        read = record["weight_bytes"] + record["cache_bytes"] * context
        speed = tokens / segment["decode_s"]
        share = speed * read / 1e9 / memory
        steady = is_steady(before, after)
        figures = {"round": record["round"], "tokens_per_s": speed, "memory": memory, "share": share, "steady": steady}
        found.append(figures | {"cores": segment["decode_cpu_s"] / segment["decode_s"]})
    return found


def ratio_interval(ours: list[float], theirs: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Ratio of the medians, and its 95 % interval by resampling rounds (percentile bootstrap).

    Args:
        ours, theirs: one figure a round; the same index is the same round, so what disturbs one disturbs both.
    """
    above, below = np.array(ours), np.array(theirs)
    drawn = np.random.default_rng(seed).integers(len(above), size=(RESAMPLES, len(above)))
    ratios = np.median(above[drawn], axis=1) / np.median(below[drawn], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(np.median(above) / np.median(below)), float(low), float(high)


def pooled_ratio(ours: list[Record], theirs: list[Record], key: str, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of the medians of figures of which rounds have different numbers, and its 95 % interval by resampling the
    rounds of each side.
    """
    luck = np.random.default_rng(seed)

    def resampled(figures: list[Record]) -> Any:
        by_round: dict[int, list[float]] = {}
        for one in figures:
            by_round.setdefault(one["round"], []).append(one[key])
        groups = list(by_round.values())
        drawn = luck.integers(len(groups), size=(RESAMPLES // 5, len(groups)))
        return np.array([np.median(np.concatenate([groups[i] for i in row])) for row in drawn])

    low, high = np.quantile(resampled(ours) / resampled(theirs), (0.025, 0.975))
    medians = [statistics.median(one[key] for one in figures) for figures in (ours, theirs)]
    return medians[0] / medians[1], float(low), float(high)


def summarise(records: list[Record], reference: str = REFERENCE) -> dict[int, dict[str, dict[str, Any]]]:
    """By length and stack: medians over rounds, decoding by phase of the memory ("slow", "fast"; "all" where there is
    one), and ratios of the reference's speed to this one's: [ratio, low, high].
    """
    found = measurements(records)
    steady = [one["memory"] for record in found for one in decodes(record) if one["steady"]]
    limit = split_phases(steady)
    lengths = sorted({record["length"] for record in found})
    return {
        length: _summarise_length([r for r in found if r["length"] == length], limit, reference) for length in lengths
    }


def _summarise_length(found: list[Record], limit: float | None, reference: str) -> dict[str, dict[str, Any]]:
    stacks = list(dict.fromkeys(record["stack"] for record in found))
    prefills: dict[str, dict[int, float]] = {stack: {} for stack in stacks}
    phases: dict[str, dict[str, list[Record]]] = {stack: {} for stack in stacks}
    for record in found:
        prefills[record["stack"]][record["round"]] = record["length"] / record["prefill_s"]
        for one in decodes(record):
            if one["steady"]:
                phase = "all" if limit is None else "slow" if one["memory"] < limit else "fast"
                phases[record["stack"]].setdefault(phase, []).append(one)
    rows = {}
    for stack in stacks:
        own = [record for record in found if record["stack"] == stack]
        tried = [one for record in own for one in decodes(record)]
        row: dict[str, Any] = {
            "rounds": len(own),
            "prefill": statistics.median(prefills[stack].values()),
            "dropped": sum(not one["steady"] for one in tried),
            "tried": len(tried),
            "decode": {},
            "decode_cores": statistics.median(one["cores"] for one in tried),
            "prefill_cores": statistics.median(record["prefill_cpu_s"] / record["prefill_s"] for record in own),
            "busy": statistics.median(record["busy"] for record in own),
        }
        for kind in ("load_s", "cold_first_token_s", "peak_resident_bytes", "peak_anonymous_bytes"):
            row[kind] = statistics.median(record[kind] for record in own)
        both = sorted(prefills[stack].keys() & prefills.get(reference, {}).keys())
        if both:
            sides = ([prefills[name][turn] for turn in both] for name in (reference, stack))
            row["prefill_ratio"] = ratio_interval(*sides)
        for phase, figures in phases[stack].items():
            row["decode"][phase] = {
                "tokens_per_s": statistics.median(one["tokens_per_s"] for one in figures),
                "share": statistics.median(one["share"] for one in figures),
                "memory": statistics.median(one["memory"] for one in figures),
                "figures": len(figures),
                "rounds": len({one["round"] for one in figures}),
            }
            if theirs := phases.get(reference, {}).get(phase):
                for name, key in (("ratio", "tokens_per_s"), ("share_ratio", "share")):
                    row["decode"][phase][name] = pooled_ratio(theirs, figures, key)
        rows[stack] = row
    return rows


def report(records: list[Record], reference: str = REFERENCE) -> str:
    """Markdown."""
    run = next(record for record in reversed(records) if record["kind"] == "run")
    revisions = dict.fromkeys(record["revision"] for record in records if record["kind"] == "run")
    machine, found = run["machine"], measurements(records)
    steady = [one["memory"] for record in found for one in decodes(record) if one["steady"]]
    limit = split_phases(steady)
    phase_names = ["all"] if limit is None else ["slow", "fast"]
    memory = f"read at {min(steady, default=0):.0f} to {max(steady, default=0):.0f} GB/s while decoding "
    memory += "(one phase)" if limit is None else f"(slow and fast phase parted at {limit:.0f} GB/s)"
    lines = [
        f"# {run['shape']}: the same work through several libraries, {run['date']}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, {', '.join(machine['instruction_sets'])}; "
        f"{machine['memory_gb']:.0f} GB of memory, {memory}. Prompts are the same for all and new in each round; "
        f"greedy tokens after them. normistral at {', '.join(revisions)}.",
        "",
        f"Medians, tokens/s. × is the speed of {reference} over that of the row, with the 95 % interval over rounds; "
        "for decoding within the phase of the memory. A decode figure counts where the bandwidth just before and just "
        "after it agree within 10 %; the others are dropped. Share: bytes of weights and KV cache that a token reads, "
        "by time, by that bandwidth. Load is that of weights, without imports; cold is the first answer after it. Busy "
        "is the processor time that everybody else took during the prompt, in cores; "
        f"{sum(record['kind'] == 'disturbed' for record in records)} measurements with more of it do not count.",
    ]
    for length, rows in summarise(records, reference).items():
        decode = "".join(f"| decode, {name} memory | share | × " for name in phase_names)
        lines += [
            "",
            f"## {length:,} tokens",
            "",
            f"| stack | rounds | prefill | × {decode}| dropped | load + cold, s ",
        ]
        lines[-1] += "| peak RSS / anonymous, GB | cores pp / tg | busy |"
        lines.append("|" + "---|" * (9 + 3 * len(phase_names)))
        for name, row in rows.items():
            cells = [name, str(row["rounds"]), f"{row['prefill']:.1f}"]
            cells.append("" if name == reference else _interval(row.get("prefill_ratio")))
            for phase in phase_names:
                figures = row["decode"].get(phase)
                if figures is None:
                    cells += ["", "", ""]
                    continue
                cells.append(f"{figures['tokens_per_s']:.2f} ({figures['figures']} in {figures['rounds']})")
                cells.append(f"{figures['share']:.0%} of {figures['memory']:.0f}")
                cells.append("" if name == reference else _interval(figures.get("ratio")))
            cells += [f"{row['dropped']} of {row['tried']}", f"{row['load_s']:.1f} + {row['cold_first_token_s']:.2f}"]
            cells.append(f"{row['peak_resident_bytes'] / 1e9:.2f} / {row['peak_anonymous_bytes'] / 1e9:.2f}")
            cells += [f"{row['prefill_cores']:.2f} / {row['decode_cores']:.2f}", f"{row['busy']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| stack | library | weights / KV cache, bytes a token | settings |", "|---|---|---|---|"]
    for record in {record["stack"]: record for record in found}.values():
        settings = ", ".join(f"{key}={value}" for key, value in record["settings"].items()).replace("|", "/")
        sizes = f"{record['weight_bytes'] / 1e9:.3f} GB / {record['cache_bytes'] / 1e3:.1f} kB"
        lines.append(f"| {record['stack']} | {record['library']} | {sizes} | {settings} |")
    for record in records:
        if record["kind"] == "failure":
            lines += ["", f"**{record['stack']} failed in round {record['round']}:**", ""]
            lines += [f"    {line}" for line in record["error"].splitlines()]
    return "\n".join(lines) + "\n"


def _interval(ratio: tuple[float, float, float] | None) -> str:
    return "" if ratio is None else "{:.2f} ({:.2f}–{:.2f})".format(*ratio)


if __name__ == "__main__":
    print(report(read_records(Path(sys.argv[1])), *sys.argv[2:3]))
