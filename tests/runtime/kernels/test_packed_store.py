"""The file of packed weights beside the store: written once, mapped afterwards, and never trusted or used blindly."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import normistral
from normistral.artifact import store
from normistral.files import locked
from normistral.hardware import read_machine
from normistral.runtime.kernels import openvino_int4, packed_store
from normistral.runtime.kernels.library import find_library
from normistral.runtime.kernels.packed_store import HUGE_PAGE, drop_file_pages, find_key, load_packed

KEY = bytes(range(24))
WEIGHTS = np.random.default_rng(0).integers(0, 256, HUGE_PAGE + 4096, np.uint8)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A store whose file system holds files in huge pages, as far as the package can tell."""
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(packed_store, "_is_huge", lambda mapped: True)
    return tmp_path / "home"


class Packing:
    """Makes the weights in two pieces of one scratch memory, and counts how often."""

    def __init__(self):
        self.times = 0

    def __call__(self):
        self.times += 1
        scratch = np.empty(HUGE_PAGE, np.uint8)
        for piece in (WEIGHTS[:HUGE_PAGE], WEIGHTS[HUGE_PAGE:]):
            scratch[: piece.size] = piece
            yield scratch[: piece.size]


def load(packing=None, key=KEY):
    return load_packed(key, WEIGHTS.size, packing or Packing(), zlib.crc32)


def stored():
    return sorted(path.name for path in store.packed_dir().iterdir())


def test_weights_are_packed_once_and_mapped_afterwards():
    packing = Packing()
    for _ in range(3):
        found = load(packing)
        assert np.array_equal(found, WEIGHTS)
        assert not found.flags.writeable
    assert packing.times == 1
    assert stored() == [f"{KEY.hex()}.int4"]
    assert store.packed_dir().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("at", [0, HUGE_PAGE + 5, WEIGHTS.size + 1, WEIGHTS.size + 30])
def test_a_changed_byte_anywhere_is_found_and_the_file_made_again(caplog, at):
    load()
    (path,) = store.packed_dir().iterdir()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    packing = Packing()
    assert np.array_equal(load(packing), WEIGHTS)
    assert packing.times == 1
    assert "is damaged: it is made again" in caplog.text
    assert zlib.crc32(path.read_bytes()[: WEIGHTS.size]) == zlib.crc32(WEIGHTS)


@pytest.mark.parametrize("size", [0, 1, WEIGHTS.size, WEIGHTS.size + 47, WEIGHTS.size + 49])
def test_a_file_of_another_size_is_made_again(caplog, size):
    load()
    (path,) = store.packed_dir().iterdir()
    os.truncate(path, size)
    assert np.array_equal(load(), WEIGHTS)
    assert "damaged" in caplog.text


@pytest.mark.parametrize("whose", ["file", "folder"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_a_file_that_others_may_write_is_not_used(caplog, whose, mode):
    load()
    path = next(store.packed_dir().iterdir()) if whose == "file" else store.packed_dir()
    path.chmod(0o700 | mode)
    packing = Packing()
    assert load(packing) is None
    assert packing.times == 0
    assert f"others may write to {path}" in caplog.text
    assert f"chmod go-w {path}" in caplog.text


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path, caplog):
    load()
    (path,) = store.packed_dir().iterdir()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert load() is None
    assert "not kept" in caplog.text


def test_a_file_system_without_huge_pages_gets_no_file(monkeypatch):
    monkeypatch.setattr(packed_store, "_is_huge", lambda mapped: False)
    packing = Packing()
    assert load(packing) is None
    assert packing.times == 0
    assert stored() == []


def test_a_file_that_lies_in_small_pages_is_copied(monkeypatch):
    load()
    monkeypatch.setattr(packed_store, "_is_huge", lambda mapped: False)
    found = load()
    assert np.array_equal(found, WEIGHTS)
    assert found.flags.writeable  # memory of its own


def test_the_files_that_were_not_used_for_longest_go_first(monkeypatch):
    monkeypatch.setattr(packed_store, "MOST_BYTES", 3 * WEIGHTS.size + 1000)
    for number in range(3):
        load(key=bytes([number] * 24))
        os.utime(store.packed_dir() / f"{bytes([number] * 24).hex()}.int4", (number, number))
    load(key=bytes(24))  # used again
    load(key=bytes([3] * 24))
    assert stored() == sorted(f"{bytes([number] * 24).hex()}.int4" for number in (0, 2, 3))
    monkeypatch.setattr(packed_store, "MOST_BYTES", WEIGHTS.size - 1)
    assert load(key=bytes([4] * 24)) is None


def test_a_disk_with_little_room_gets_no_file(monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * WEIGHTS.size - 1))
    assert load() is None
    assert stored() == []


def test_a_process_that_writes_holds_up_nobody_and_one_that_was_killed_leaves_nothing(home):
    folder = store.packed_dir()
    folder.mkdir(mode=0o700, parents=True)
    (folder / ".writing-killed").write_bytes(b"half a file")
    with locked(folder / "lock"):
        assert load() is None
        assert ".writing-killed" in stored()
    assert load() is not None
    assert stored() == [f"{KEY.hex()}.int4"]


def test_what_fails_while_it_is_written_leaves_nothing(monkeypatch, caplog):
    def fail():
        yield WEIGHTS[:HUGE_PAGE]
        raise OSError(28, "No space left on device")

    assert load(fail) is None
    assert stored() == []
    assert "the kernel's weights are not kept in" in caplog.text


def test_a_store_that_cannot_be_made_is_named(home, caplog):
    home.write_text("a file")
    assert load() is None
    assert str(home) in caplog.text


def test_pages_of_files_are_dropped_and_read_again(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(WEIGHTS.tobytes())
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), WEIGHTS.size, access=mmap.ACCESS_READ), np.uint8)
    anonymous = WEIGHTS.copy()

    def resident():
        maps = Path("/proc/self/smaps").read_text(encoding="utf-8").partition(f"{path}\n")[2]
        return int(re.search(r"Rss:\s+(\d+)", maps)[1])

    assert int(mapped.max()) == 255
    assert resident() * 1024 >= HUGE_PAGE
    drop_file_pages([mapped, anonymous, mapped[5:7]])
    assert resident() == 0
    assert np.array_equal(mapped, WEIGHTS)
    assert np.array_equal(anonymous, WEIGHTS)


ANSWER = """
import sys
import normistral
from normistral.runtime.kernels import openvino_int4, packed_store
openvino_int4.WORTH_BYTES = 0
packed_store._is_huge = lambda mapped: True
with normistral.load(sys.argv[1], settings={"int4_weights": "mapped"}) as model:
    tokens = model.generate([5, 6, 7], max_new_tokens=8, temperature=0.0, ignore_eos=True).token_ids
    print(model.capabilities.settings["int4_weights"], tokens)
"""


@pytest.mark.skipif(find_library(read_machine()) is None, reason="needs the package's compiled kernel")
def test_models_give_the_same_bits_from_the_file_and_two_processes_may_begin_at_once(tiny_int4, monkeypatch):
    with normistral.load(tiny_int4, settings={"int4_kernel": "normistral"}) as model:
        expected = model.generate([5, 6, 7], max_new_tokens=8, temperature=0.0, ignore_eos=True).token_ids
        assert model.capabilities.settings["int4_weights"] == "memory"
    with normistral.load(tiny_int4, settings={"int4_kernel": "normistral", "int4_weights": "mapped"}):
        assert not store.packed_dir().exists()  # a small model is packed in a moment
    started = [
        subprocess.Popen([sys.executable, "-c", ANSWER, str(tiny_int4)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    placements, tokens = zip(*(process.communicate()[0].strip().split(" ", 1) for process in started), strict=True)
    assert tokens == (str(expected),) * 2
    assert set(placements) in ({"mapped"}, {"mapped", "memory"})  # one that finds the other writing does not wait
    assert len(stored()) == 1
    monkeypatch.setattr(openvino_int4, "WORTH_BYTES", 0)
    monkeypatch.setattr(openvino_int4, "_pack", None)  # not called again
    with normistral.load(tiny_int4, settings={"int4_kernel": "normistral", "int4_weights": "mapped"}) as model:
        found = model.generate([5, 6, 7], max_new_tokens=8, temperature=0.0, ignore_eos=True).token_ids
    assert found == expected


@pytest.mark.skipif(find_library(read_machine()) is None, reason="needs the package's compiled kernel")
def test_weights_that_were_copied_out_of_the_file_are_not_called_mapped(tiny_int4, monkeypatch):
    monkeypatch.setattr(openvino_int4, "WORTH_BYTES", 0)
    settings = {"int4_kernel": "normistral"}
    with normistral.load(tiny_int4, settings=settings) as model:
        assert model.capabilities.settings["int4_weights"] == "mapped"  # the default
    monkeypatch.setattr(packed_store, "_is_huge", lambda mapped: False)
    with normistral.load(tiny_int4, settings=settings) as model:
        assert model.capabilities.settings["int4_weights"] == "memory"


def test_other_weights_and_other_layouts_have_other_keys(tiny_int4, tmp_path):
    artifact = shutil.copytree(tiny_int4, tmp_path / "artifact")
    file = artifact / "openvino_model.xml"
    keys = {find_key(file, 16, 1000), find_key(file, 8, 1000), find_key(file, 16, 2000)}
    assert find_key(tiny_int4 / file.name, 16, 1000) in keys  # a copy of the same times
    os.utime(file.with_suffix(".bin"), (1, 1))
    keys.add(find_key(file, 16, 1000))
    with (artifact / "normistral.json").open("a") as manifest:
        manifest.write("\n")
    keys.add(find_key(file, 16, 1000))
    assert len(keys) == 5
    (artifact / "normistral.json").unlink()
    assert find_key(file, 16, 1000) is None
