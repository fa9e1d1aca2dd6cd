"""Weight files by an enemy: nothing of them runs, nothing that they promise is allocated, every refusal is a line."""

from __future__ import annotations

import io
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf  # noqa: F401  (the readers import it, which is not theirs to pay for in the measurements)
import pytest
import torch
from broken_gguf import BROKEN_GGUF, GOOD_GGUF, TEXT, U8, gguf_array, gguf_text, meta
from broken_gguf import gguf as gguf_file
from broken_safetensors import BROKEN_SAFETENSORS, GOOD_SAFETENSORS, safetensors
from broken_torch import BROKEN_TORCH, GOOD_TORCH, torch_file, zipped
from hostile_pickles import (
    CODES,
    DICT,
    DORMANT,
    EMPTY,
    GOOD,
    LIST,
    ONE,
    RUNNING,
    TWO,
    call,
    named,
    number,
    put,
    table,
    text,
    whole,
)
from hypothesis import example, given
from hypothesis import strategies as st
from processor_speed import within
from safetensors.torch import save
from tiny_models import make_mistral

from normistral.errors import CheckpointError
from normistral.export.checkpoint.gguf_file import read_gguf
from normistral.export.checkpoint.locate import Located
from normistral.export.checkpoint.open import open_checkpoint
from normistral.export.checkpoint.torch_file import read_torch_file
from normistral.export.checkpoint.weights import find_weight_files, read_safetensors, read_tensors
from normistral.progress import NoProgress

# What the interpreter itself takes while reading a file of a few hundred bytes: compiled patterns, the traceback, a
# buffer of the file, Python objects of 50 bytes for what is one byte in the file. Every promise of the broken files
# that is not a matter of arithmetic alone is several times larger.
FLOOR_BYTES = 5 * 2**20  # objects 100,000 deep take 4.2 MiB until Python 3.14 gives up
# The same for a file at the reader's own limit on operations or header, where small records do add up.
LIMIT_BYTES = 32 * 2**20
HOSTILE = RUNNING | DORMANT
SCRIPTS = Path(__file__).parents[2] / "scripts"


def refusal(read: Callable[[Path], Any], path: Path, limit_bytes: int = FLOOR_BYTES) -> str:
    """The message of a refusal that was quick, in one line, with a hint, and took little memory.

    Time is the processor's, and of a reading of its own: a busy machine is no failure, and tracing allocations makes
    a reading several times slower.
    """
    start = time.process_time()
    with pytest.raises(CheckpointError):
        read(path)
    assert within(time.process_time() - start, 2)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= max(path.stat().st_size, limit_bytes)
    assert caught.value.hint
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 600
    assert path.name in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_runs_something_is_refused_and_runs_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(torch_file(HOSTILE[name](tmp_path)))
    message = refusal(lambda path: read_tensors(find_weight_files(path.parent)), path)
    assert "holds more than tensors: " in message
    assert message.endswith("; nothing was run")
    assert not (tmp_path / "ran").exists()


def test_plain_pickle_runs_every_one_of_them(tmp_path: Path) -> None:
    """The control: they are not refused because they would not work."""
    command = [sys.executable, str(SCRIPTS / "run_pickles.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert set(done.stdout.splitlines()) == set(RUNNING)
    assert len(RUNNING) >= 25


@pytest.mark.parametrize(
    ("name", "named_there"),
    [
        ("os.system", "names os.system"),
        ("builtins.eval", "names builtins.eval"),
        ("torch.load through functools.partial", "names functools.partial"),
        ("INST", "asks for INST of os system"),
        ("STACK_GLOBAL", "asks for STACK_GLOBAL after os.system"),
        ("EXT1 through copyreg", "names copyreg.add_extension"),
        ("EXT4", "asks for EXT4 of 1048576"),
        ("PERSID", "asks for PERSID of os.system"),
        ("a global in a persistent id", "names os.system"),
        ("a storage that is called", "calls torch.FloatStorage in a way that torch.save does not"),
    ],
)
def test_the_refusal_names_what_was_asked_for(name: str, named_there: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(torch_file(HOSTILE[name](tmp_path)))
    assert named_there in refusal(read_torch_file, path)


def test_a_pickle_in_the_second_shard_stops_the_whole_checkpoint(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", safetensors=False, shards=2)
    (folder / "pytorch_model-00002-of-00002.bin").write_bytes(torch_file(RUNNING["beside tensors"](tmp_path)))
    (tmp_path / "workspace").mkdir()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin holds more than tensors.*os\.system"):
        open_checkpoint(Located("folder", folder, "model", None, None), tmp_path / "workspace", progress=NoProgress())
    assert not (tmp_path / "ran").exists()


def test_a_named_module_is_not_even_imported(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(torch_file(whole(call(named("antigravity", "fly")))))
    assert "antigravity.fly" in refusal(read_torch_file, path)
    assert "antigravity" not in sys.modules


READERS = {
    "safetensors": (read_safetensors, BROKEN_SAFETENSORS, GOOD_SAFETENSORS),
    "gguf": (read_gguf, BROKEN_GGUF, GOOD_GGUF),
    "bin": (read_torch_file, BROKEN_TORCH, GOOD_TORCH),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in READERS for name in READERS[kind][1]])
def test_a_broken_file_is_refused_at_once_and_in_little_memory(kind: str, name: str, tmp_path: Path) -> None:
    read, files, good = READERS[kind]
    path = tmp_path / f"broken.{kind}"
    path.write_bytes(good)
    read(path)  # what the broken ones are made from is in order, and all caches are warm
    path.write_bytes(files[name])
    refusal(read, path)


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("safetensors", "a name twice", "not valid JSON: it has one name twice"),
        ("safetensors", "objects 100,000 deep", "nested too deeply"),
        ("safetensors", "overlap", "its tensors overlap or leave gaps"),
        ("safetensors", "product that wraps to 2", "'a' has 8 bytes, but its shape needs"),
        ("gguf", "overlap", "tensors overlap"),
        ("gguf", "one key twice", "two values of the name 'general.architecture'"),
        ("gguf", "offset between two lines", "'a' begins at byte 4, no multiple of 32"),
        ("gguf", "alignment 0", "alignment 0"),
        ("gguf", "name with line ends", r"'a\nhint: all is well\n' begins at"),
        ("bin", "entry over the next one", "entries overlap"),
        ("bin", "storage twice", "two entries have the name 'x/data/0'"),
        ("bin", "absolute name", "an entry has the name '/etc/passwd'"),
        ("bin", "storage is compressed", "the entry 'x/data/0' is compressed"),
        ("bin", "pickle is encrypted", "the entry 'x/data.pkl' is encrypted"),
        ("bin", "another name in the file", "the entry 'x/data/0' differs from the table of contents"),
        ("bin", "2^64 - 1 entries", "its table of contents is cut"),
        ("bin", "big-endian", "was written with the byte order 'big'"),
        ("bin", "missing storage", "the bytes of 'a' are missing"),
        ("bin", "offset beyond the storage", "'a' does not fit in the 16 bytes that are there for it"),
        ("bin", "expanded", "'a' is stored transposed, cut or repeated"),
        ("bin", "one name twice", "it holds two values of the name 'a'"),
        ("bin", "more operations than tensors need", "more than 131072 operations"),
    ],
)
def test_the_refusal_says_what_is_wrong(kind: str, name: str, reason: str, tmp_path: Path) -> None:
    read, files, _ = READERS[kind]
    path = tmp_path / f"broken.{kind}"
    path.write_bytes(files[name])
    assert reason in refusal(read, path)


def test_no_broken_file_needs_address_space(tmp_path: Path) -> None:
    """As above, where numpy, mmap and the zip and pickle readers cannot hide what they take from tracemalloc."""
    command = [sys.executable, str(SCRIPTS / "measure_refusals.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == f"{sum(len(files) for _, files, _ in READERS.values())}\n", done.stderr


_OPERATIONS = 120_000
SWOLLEN = {
    "nested tables": whole(DICT * _OPERATIONS),
    "nested lists": whole(LIST * _OPERATIONS),
    "remembered tables": whole(b"".join(DICT + CODES["LONG_BINPUT"] + number(i)[1:] for i in range(60_000))),
    "pairs of pairs": whole(LIST, LIST, TWO, (put(0) + CODES["BINGET"] + b"\0" + TWO) * 40_000),
    "nested tuples": whole(EMPTY, ONE * _OPERATIONS),
    "tables in tables": whole((DICT + text("a")) * 60_000),
}


@pytest.mark.parametrize("name", SWOLLEN)
def test_a_pickle_of_nothing_but_records_stays_within_limits(name: str, tmp_path: Path) -> None:
    path = tmp_path / "swollen.bin"
    path.write_bytes(torch_file(SWOLLEN[name]))
    refusal(read_torch_file, path, LIMIT_BYTES)


def test_a_header_of_nothing_but_lists_stays_within_limits(tmp_path: Path) -> None:
    path = tmp_path / "swollen.safetensors"
    path.write_bytes(safetensors(b'{"a":[' + b"[],[]," * 150_000 + b"[]]}"))
    refusal(read_safetensors, path, LIMIT_BYTES)
    path.write_bytes(safetensors(b"{}" + b" " * (4 * 2**20)))
    assert "truncated or not a safetensors file" in refusal(read_safetensors, path)


def test_arrays_of_a_gguf_file_take_no_more_than_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    count = 2**23
    path.write_bytes(
        gguf_file((meta("bytes", 9, gguf_array(U8, count, bytes(count))), meta("k", TEXT, gguf_text(b"v"))))
    )
    tracemalloc.start()
    try:
        metadata = read_gguf(path).metadata
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(metadata["bytes"]), metadata["k"]) == (count, "v")
    assert peak <= path.stat().st_size + 2**20


def test_a_table_of_contents_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "many.bin"
    path.write_bytes(zipped([(f"x/data/{i}", b"") for i in range(30_000)]))
    assert "a table of contents of" in refusal(read_torch_file, path)


def good_files() -> dict[str, bytes]:
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    tensors["c"] = torch.tensor(1.0, dtype=torch.float16)
    written = io.BytesIO()
    torch.save(tensors | {"d": tensors["a.weight"][1]}, written)
    return {"safetensors": save(tensors), "bin": written.getvalue(), "gguf": GOOD_GGUF}


WHOLE = good_files()
flips = st.lists(st.tuples(st.integers(0, 2**20), st.integers(1, 255)), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", READERS)
@given(flips=flips, cut=st.integers(0, 2**20))
@example(flips=[(0, 0)], cut=0)
def test_flipped_bytes_give_tensors_of_the_file_or_a_refusal(
    kind: str, flips: list[tuple[int, int]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    read, _, _ = READERS[kind]
    data = bytearray(WHOLE[kind])
    for place, change in flips:
        data[place % len(data)] ^= change
    if cut % 5 == 1:
        del data[cut % len(data) :]
    path = tmp_path_factory.getbasetemp() / f"flipped.{kind}"
    path.write_bytes(data)
    found, refused = None, None
    try:
        found = read(path)
    except CheckpointError as error:
        refused = error
    if refused is not None:
        assert refused.hint
        assert refused.message.isprintable()
        assert bytes(data) != WHOLE[kind]
    else:
        tensors = (found.tensors if kind == "gguf" else found).values()
        assert all(0 < tensor.start <= tensor.start + tensor.nbytes <= len(data) for tensor in tensors)


def test_tensors_beside_each_other_are_read(tmp_path: Path) -> None:
    """That the refusals above are no refusal of everything: the pieces that they are made of are read."""
    path = tmp_path / "good.bin"
    path.write_bytes(torch_file(whole(table(a=GOOD, b=GOOD))))
    assert {name: tensor.shape for name, tensor in read_torch_file(path).items()} == {"a": (2, 2), "b": (2, 2)}
