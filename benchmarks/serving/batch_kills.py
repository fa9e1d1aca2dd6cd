"""A batch job on Ray Data whose workers and drivers are killed (SIGKILL); every answer is compared with the known one.

    python benchmarks/serving/batch_kills.py ARTIFACT [--rows 60] [--workers 2] [--max-new-tokens 16]

The known answers are those of one model in one process, without Ray, in exact arithmetic. Then the same job runs three
times under Ray: undisturbed; with two workers killed one after the other; and with its driver killed twice. Whether
anything finished was done again is read in the journal, before the job removes it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from normistral.batch.journal import parts_folder

_PATIENCE_S = 600.0
_SUBJECTS = ("snow", "bread", "a river", "the sun", "a fish", "iron", "a fjord", "rain", "a bridge", "wool")
_QUESTIONS = ("What is {}?", "Write one sentence about {}.", "Name a colour of {}.")


def write_documents(path: Path, rows: int) -> None:
    texts = [question.format(subject) for question in _QUESTIONS for subject in _SUBJECTS]
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            document = {"id": f"d{number}", "text": f"{texts[number % len(texts)]} ({number})"}
            stream.write(json.dumps(document) + "\n")


def command(arguments: argparse.Namespace, source: Path, output: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "normistral", "batch", arguments.artifact, str(source), str(output)),
        *("--instruction", "{text}", "--temperature", "0", "--exact"),
        *("--max-new-tokens", str(arguments.max_new_tokens), *options),
    ]


def answered(output: Path) -> list[int]:
    """Rows in the journal, in the order of its files; those that two workers answered come twice."""
    rows = []
    for file in parts_folder(output).glob("*.jsonl"):
        with suppress(FileNotFoundError):  # a finished job removes its journal
            lines = file.read_bytes().split(b"\n")[:-1]
            rows += [json.loads(line)["row"] for line in lines if b'"row"' in line]
    return rows


def workers_of(driver: int) -> list[int]:
    """Processes of this job that hold a model: found by what Ray calls them."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                name = (folder / "cmdline").read_bytes()
                environment = (folder / "environ").read_bytes()
            except OSError:
                continue
            if b"MapWorker" in name and f"NORMISTRAL_KILLS={driver}".encode() in environment:
                found.append(int(folder.name))
    return found


def wait_for(output: Path, rows: int, driver: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _PATIENCE_S
    while len(answered(output)) < rows:
        if driver.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the job ended early or hangs: exit code {driver.poll()}")
        time.sleep(0.2)


def start(job: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """A driver, and the mark by which its workers are known."""
    mark = time.monotonic_ns()
    return subprocess.Popen(job, env=os.environ | {"NORMISTRAL_KILLS": str(mark)}, stdout=subprocess.PIPE), mark


def watched(driver: subprocess.Popen[bytes], output: Path) -> Iterator[list[int]]:
    """What the journal holds, until the driver ends."""
    while driver.poll() is None:
        yield answered(output)
        time.sleep(0.05)


def finish(driver: subprocess.Popen[bytes], output: Path) -> tuple[dict[str, float], int]:
    """What the job printed, and how often an answered row was answered again."""
    most: Counter[int] = Counter()
    for rows in watched(driver, output):
        most |= Counter(rows)
    assert driver.stdout is not None
    printed = driver.stdout.read()
    if driver.returncode:
        raise SystemExit(f"the job ended with exit code {driver.returncode}")
    return json.loads(printed), sum(count - 1 for count in most.values())


def kill_workers(job: list[str], output: Path, rows: int) -> tuple[dict[str, float], int]:
    driver, mark = start(job)
    for share in (0.25, 0.5):
        wait_for(output, int(share * rows), driver)
        victim = workers_of(mark)[0]
        os.kill(victim, signal.SIGKILL)
        print(f"  killed worker {victim} after {len(answered(output))} rows", flush=True)
    return finish(driver, output)


def kill_drivers(job: list[str], output: Path, rows: int) -> tuple[dict[str, float], int]:
    for share in (0.25, 0.5):
        driver, _ = start(job)
        wait_for(output, int(share * rows), driver)
        driver.kill()
        driver.wait()
        print(f"  killed driver {driver.pid} after {len(answered(output))} rows", flush=True)
    driver, _ = start(job)
    return finish(driver, output)


def run(job: list[str], output: Path, rows: int) -> tuple[dict[str, float], int]:
    return finish(start(job)[0], output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        source, known = Path(folder) / "documents.jsonl", Path(folder) / "known.jsonl"
        write_documents(source, arguments.rows)
        started = time.perf_counter()
        subprocess.run(command(arguments, source, known), check=True)
        print(f"one process, no Ray: {arguments.rows} rows in {time.perf_counter() - started:.1f} s", flush=True)
        for name, way in (("undisturbed", run), ("workers killed", kill_workers), ("drivers killed", kill_drivers)):
            print(f"{name}:", flush=True)
            output = Path(folder) / f"{name.replace(' ', '-')}.jsonl"
            job = command(arguments, source, output, "--workers", str(arguments.workers), "--json")
            summary, again = way(job, output, arguments.rows)
            same = output.read_bytes() == known.read_bytes()
            failed |= not same or bool(again)
            print(
                f"  {summary['rows']} rows, {summary['found']} of them of earlier runs, {summary['failed']} failed, "
                f"{again} done again, {summary['seconds']:.1f} s: {'the known answers' if same else 'OTHER ANSWERS'}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
