"""Plant 1,000 neighbours around 200 exports and saves, and see that nothing but OUTPUT changes, and nothing hangs.

    python tests/scripts/show_planted.py

Links, FIFOs, folders, sockets, devices and files of another user (the last two as root), under the names that are used
beside an OUTPUT, and at random. Each OUTPUT is exported to (without a model), saved to as a session is, a result,
or a batch's answers; a third of them with something that is no file in OUTPUT's own place.
Exits with 1 if anything else changed, or one took longer than 10 seconds. Takes half a minute.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from planted import NOBODY, look, plant

from normistral.artifact.manifest import MANIFEST_NAME
from normistral.batch.journal import begin_run, join_answers, open_journal, remove_journal
from normistral.commands.result_files import require_result_place, write_result
from normistral.commands.saved_chats import save_conversation
from normistral.errors import NormistralError
from normistral.export.staging import stage
from normistral.files import FOLDER_MARK, atomic_write, require_place

OUTPUTS, NEIGHBOURS, MOST_S = 200, 1000, 10
KINDS = ["link", "dangling link", "circle", "fifo", "folder", "socket"] + ["device"] * (os.geteuid() == 0)


def export(path: Path) -> None:
    with stage(path, force=True) as staged:
        (staged.artifact / "model.bin").write_text("new")
        (staged.artifact / MANIFEST_NAME).write_text('{"files": {"model.bin": {}}}')


def save(path: Path) -> None:
    require_place(path)
    with atomic_write(path) as file:
        file.write(b"new")


def converse(path: Path) -> None:
    save_conversation(str(path), [], artifact="a", settings={}, overwrite=True)


def report(path: Path) -> None:
    require_result_place(path, "--report")
    write_result(path, "new")


def answer(path: Path) -> None:
    require_place(path)
    with open_journal(path, {"a": 1}) as parts:
        begin_run(parts)
        join_answers([], path)
        remove_journal(parts)


def neighbour(output: Path, chance: random.Random) -> Path:
    """A name beside an OUTPUT: one that is used there, or any."""
    tail = "".join(chance.choices("0123456789abcdef", k=8))
    names = [
        f".{output.name}.partial-{tail}",
        f".{output.name}.partial-x{tail}",
        f".{output.name}.kept-{tail}",
        f".{output.name}.{tail}",
        f".{output.name}.lock",
        f"{output.name}.parts",
        f"{output.name}.sig",
        f".normistral-{tail}",
        tail,
    ]
    return output.with_name(chance.choice(names))


def plant_folder(path: Path, chance: random.Random) -> None:
    """A folder as a killed export leaves one, perhaps with our mark, then of another user."""
    path.mkdir()
    for name in ("artifact", "replaced"):
        (path / name).mkdir()
        (path / name / MANIFEST_NAME).write_text('{"files": {}}')
        (path / name / "thesis").write_text("years of work")
    if os.geteuid() == 0 and chance.random() < 0.5:
        (path / FOLDER_MARK).touch()
        os.chown(path / FOLDER_MARK, NOBODY, NOBODY)
        os.chown(path, NOBODY, NOBODY)


def crowd(folder: Path, outputs: list[Path], chance: random.Random) -> Counter[str]:
    """Plant the neighbours; returns how many of each kind."""
    planted: Counter[str] = Counter()
    while planted.total() < NEIGHBOURS:
        path = neighbour(chance.choice(outputs), chance)
        if os.path.lexists(path):
            continue
        kind = chance.choice([*KINDS, "left", "foreign file"])
        if kind == "left":
            plant_folder(path, chance)
        elif kind == "foreign file":
            path.write_text("of others")
            if os.geteuid() == 0:
                os.chown(path, NOBODY, NOBODY)
        elif kind == "link":
            path.symlink_to(folder / "outside" / chance.choice(["", "file", "deep"]))
        else:
            plant(path, kind)
        planted[kind] += 1
    return planted


def too_long(number: int, frame: Any) -> None:
    raise TimeoutError("it hangs")


def main() -> int:
    """Run it all."""
    chance = random.Random(17)
    acts: list[Callable[[Path], None]] = [export, save, converse, report, answer]
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("outside/deep", "place"):
            (folder / name).mkdir(parents=True)
        for name in ("outside/file", "outside/deep/file"):
            (folder / name).write_text("of others")
        outputs = [folder / "place" / f"out{number:03}" for number in range(OUTPUTS)]
        odd = [path for path in outputs if chance.random() < 1 / 3]
        for path in odd:
            kind = chance.choice([kind for kind in KINDS if kind != "fifo"])  # into one's own FIFO a report may go
            if kind == "link":
                path.symlink_to(folder / "outside" / "file")
            else:
                plant(path, kind)
                if kind == "folder":
                    (path / "thesis").write_text("years of work")
        planted = crowd(folder, outputs, chance)
        before, slowest, done = look(folder), 0.0, Counter[str]()
        for path in outputs:
            act, start = chance.choice(acts), time.perf_counter()
            signal.alarm(MOST_S)
            try:
                act(path)
                done[f"{act.__name__} done"] += 1
            except NormistralError as error:
                done[f"{act.__name__} refused" if error.hint else "no hint"] += 1
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - start)
        after = look(folder)
    mine = {path.relative_to(folder).as_posix() for path in outputs if path not in odd}
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    foreign = [name for name in changed if "/".join(name.split("/")[:2]) not in mine]
    print(f"{planted.total()} neighbours: {dict(planted)}")
    print(f"{OUTPUTS} outputs, {len(odd)} of them no files: {dict(sorted(done.items()))}")
    print(f"slowest {slowest:.2f} s; changed outside of OUTPUT: {len(foreign)} {foreign[:5]}")
    return 1 if foreign or done["no hint"] else 0


if __name__ == "__main__":
    sys.exit(main())
