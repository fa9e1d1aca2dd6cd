"""Prefill and decode of several libraries on the same model, interleaved in one run.

    python benchmarks/onnx_peers.py --llama PYTHON FILE.gguf --genai PYTHON ARTIFACT --normistral PYTHON ARTIFACT ...
        [--threads 2] [--rounds 3] [--prompt 512] [--decode 32] [--apart] [--json FILE]

Every library runs in a process of its own, with the interpreter given for it (peers/run_*.py needs numpy and the
library). An option may be given several times, for more files. onnxruntime-genai runs twice on each artifact: with its
defaults and with its threads set. A round measures each once, in turn; who waits is stopped, so that nobody's idle
threads take part. --apart loads for each measurement anew, for models that do not fit side by side.

Ratios are to the first one, llama.cpp's where it is given. "cores" is CPU time over time: how many cores a library kept
busy. "busy" is what everybody else took meanwhile, in cores: above a few hundredths, measure again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from normistral import hardware

PEERS = Path(__file__).parent / "peers"
COOL_DOWN_S = 0.5  # spinning threads of the last one have gone to sleep by then
MEASURED = ("prefill_tokens_per_s", "decode_tokens_per_s", "prefill_cores", "decode_cores", "busy")


@dataclass
class Peer:
    """One library with one model and one set of settings."""

    name: str
    command: list[str]
    described: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, float]] = field(default_factory=list)


def list_peers(arguments: argparse.Namespace) -> list[Peer]:
    threads = f"threads={arguments.threads}"
    peers = []
    for python, file in arguments.llama:
        peers.append(Peer(f"llama.cpp {Path(file).stem}", [python, str(PEERS / "run_llama.py"), file, threads]))
        if arguments.flash_off:
            peers.append(Peer(f"{peers[-1].name}, no flash attention", [*peers[-1].command, "flash_attention=off"]))
    for python, folder in arguments.genai:
        peers.append(Peer(f"genai {Path(folder).name}, default", [python, str(PEERS / "run_genai.py"), folder]))
        peers.append(Peer(f"genai {Path(folder).name}, {threads}", [*peers[-1].command, threads]))
    for python, folder in arguments.normistral:
        peers.append(Peer(f"normistral {Path(folder).name}", [python, str(PEERS / "run_normistral.py"), folder]))
    return peers


class Process:
    """A peer that is loaded and warm; it runs only while it is asked."""

    def __init__(self, peer: Peer, prompt: int, errors: IO[str]) -> None:
        self.peer, self.prompt, self.errors = peer, prompt, errors
        self.process = subprocess.Popen(
            peer.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"ORT_DISABLE_TELEMETRY": "1"},
        )
        self.peer.described = self._ask(2) | {"peak_resident_gb": round(self._peak_resident() / 1e9, 2)}
        self._pause()

    def measure(self, decode: int) -> dict[str, float]:
        self.process.send_signal(signal.SIGCONT)
        before, own_before = machine_cpu_s(), process_cpu_s(self.process.pid)
        started = time.perf_counter()
        figures = self._ask(decode)
        elapsed = time.perf_counter() - started
        own = process_cpu_s(self.process.pid) - own_before
        figures["busy"] = (machine_cpu_s() - before - own) / elapsed
        self._pause()
        return figures

    def close(self) -> None:
        self.process.kill()  # a stopped process cannot say goodbye
        self.process.wait()

    def _ask(self, decode: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{self.prompt} {decode}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: said below, with its last words
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            sys.exit(f"error: {self.peer.name} ended:\n{self.errors.read()[-2000:]}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _pause(self) -> None:
        time.sleep(COOL_DOWN_S)
        self.process.send_signal(signal.SIGSTOP)

    def _peak_resident(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def machine_cpu_s() -> float:
    """CPU seconds that all processes took, time stolen by the host included."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, interrupts, soft, stolen = map(int, fields[:8])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def process_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def loaded(peer: Peer, prompt: int) -> Iterator[Process]:
    with tempfile.TemporaryFile("w+") as errors:
        process = Process(peer, prompt, errors)
        try:
            yield process
        finally:
            process.close()


def run_rounds(peers: list[Peer], arguments: argparse.Namespace) -> None:
    with ExitStack() as alive:
        processes: dict[str, Process] = {}
        for turn in range(arguments.rounds):
            for peer in peers:
                with ExitStack() as once:
                    stack = once if arguments.apart else alive
                    if arguments.apart or peer.name not in processes:
                        processes[peer.name] = stack.enter_context(loaded(peer, arguments.prompt))
                    figures = processes[peer.name].measure(arguments.decode)
                peer.results.append(figures)
                print(f"{turn + 1} {peer.name}: {one_line(figures)}", flush=True)


def one_line(figures: dict[str, float]) -> str:
    return (
        f"pp {figures['prefill_tokens_per_s']:.1f} ({figures['prefill_cores']:.2f} cores)  "
        f"tg {figures['decode_tokens_per_s']:.2f} ({figures['decode_cores']:.2f} cores)  busy {figures['busy']:.2f}"
    )


def summarise(peer: Peer) -> dict[str, Any]:
    columns = {key: [result[key] for result in peer.results] for key in MEASURED}
    return {
        **peer.described,
        **{key: round(statistics.median(values), 3) for key, values in columns.items()},
        "prefill_range": [round(pick(columns["prefill_tokens_per_s"]), 2) for pick in (min, max)],
        "decode_range": [round(pick(columns["decode_tokens_per_s"]), 3) for pick in (min, max)],
    }


def print_table(rows: dict[str, dict[str, Any]], reference: str) -> None:
    base = rows[reference]
    print("\n| | pp | range | × | tg | range | × | cores pp/tg | busy |\n|---|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [name]
        for kind in ("prefill", "decode"):
            key = f"{kind}_tokens_per_s"
            low, high = row[f"{kind}_range"]
            cells += [f"{row[key]:.2f}", f"{low:.1f}–{high:.1f}", f"{row[key] / base[key]:.2f}"]
        cells += [f"{row['prefill_cores']:.2f}/{row['decode_cores']:.2f}", f"{row['busy']:.2f}"]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", nargs=2, action="append", default=[], metavar=("PYTHON", "GGUF"))
    parser.add_argument("--genai", nargs=2, action="append", default=[], metavar=("PYTHON", "ARTIFACT"))
    parser.add_argument("--normistral", nargs=2, action="append", default=[], metavar=("PYTHON", "ARTIFACT"))
    parser.add_argument("--flash-off", action="store_true", help="llama.cpp also without flash attention")
    parser.add_argument("--threads", type=int, default=hardware.plan_threads(hardware.read_machine()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--apart", action="store_true", help="one model in memory at a time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    peers = list_peers(arguments)
    if not peers:
        parser.error("give at least one of --llama, --genai, --normistral")
    run_rounds(peers, arguments)
    rows = {peer.name: summarise(peer) for peer in peers}
    reference = peers[0].name
    print_table(rows, reference)
    machine = hardware.read_machine()
    report = {
        "cpu": machine.cpu,
        "cores": os.cpu_count(),
        "instruction_sets": sorted(machine.instruction_sets),
        "python": platform.python_version(),
        "prompt": arguments.prompt,
        "decode": arguments.decode,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "reference": reference,
        "peers": rows,
        "measurements": {peer.name: peer.results for peer in peers},
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
