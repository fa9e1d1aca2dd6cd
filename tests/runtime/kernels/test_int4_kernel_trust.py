"""Which compiled kernels are loaded: the package's; of the store's, those that nobody else can have written."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import normistral
from normistral.errors import EngineError, UsageError
from normistral.hardware import read_machine
from normistral.runtime import collect_env
from normistral.runtime.kernels import library
from normistral.runtime.kernels.library import UntrustedKernelError, find_library, name_faster_way, open_library

OURS = {"int4_kernel": "normistral"}
PLANTED = b"not the library that was hashed"


@pytest.fixture
def stored(int4_library, tmp_path, monkeypatch):
    """A kernel in a store of this test's own."""
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "kernels"
    folder.mkdir(parents=True)
    return Path(shutil.copy(int4_library, folder))


def give_away(path, monkeypatch):
    """Make it another user's; without the right to, become another user in this package's eyes."""
    if os.geteuid() == 0:
        os.chown(path, 4242, 4242)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)


@pytest.mark.parametrize("whose", ["file", "folder"])
def test_a_kernel_of_another_user_is_not_loaded(tiny_int4, stored, monkeypatch, caplog, whose):
    give_away(stored if whose == "file" else stored.parent, monkeypatch)
    with normistral.load(tiny_int4) as model:
        assert model.capabilities.settings["int4_kernel"] == "openvino"
    assert "belongs to another user" in caplog.text
    with pytest.raises(UntrustedKernelError):
        normistral.load(tiny_int4, settings=OURS)


@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("of", ["file", "folder"])
def test_a_kernel_that_others_may_write_is_not_loaded(stored, of, mode):
    place = stored if of == "file" else stored.parent
    place.chmod(0o755 | mode)
    with pytest.raises(UntrustedKernelError, match="others may write"):
        open_library(stored)
    place.chmod(0o755)
    assert open_library(stored).path == stored


def test_a_kernel_of_the_package_is_trusted_as_the_package_is(stored, monkeypatch):
    monkeypatch.setattr(library, "PACKAGED", stored.parent)
    stored.parent.chmod(0o775)
    assert find_library(read_machine()) == stored
    assert open_library(stored).path == stored


def test_what_was_hashed_is_what_openvino_loads(tiny_int4, stored, monkeypatch):
    """Whoever puts another file into its place after the check changes nothing."""
    from normistral.runtime.engines import openvino

    swapped = []

    def open_and_swap(path):
        opened = open_library(path)
        path.rename(path.with_suffix(".away"))
        path.write_bytes(PLANTED)
        swapped.append(path)
        return opened

    monkeypatch.setattr(openvino, "open_library", open_and_swap)
    with normistral.load(tiny_int4, settings=OURS) as model:
        assert model.generate("Oslo", max_new_tokens=1, temperature=0.0).timings.new_tokens == 1
    assert swapped == [stored]


def test_a_descriptor_is_kept_for_each_file_and_not_for_each_load(stored):
    assert open_library(stored) is open_library(stored)
    first = open_library(stored)
    stored.with_suffix(".new").write_bytes(stored.read_bytes())
    stored.with_suffix(".new").replace(stored)
    assert open_library(stored).loadable == first.loadable  # a copy with weights of its own would not find the others
    assert Path(first.loadable).read_bytes() == stored.read_bytes()


def test_another_openvino_than_the_packages_kernel_is_for(tiny_int4, stored, monkeypatch):
    monkeypatch.setattr(library, "PACKAGED", stored.parent)
    for module in ("compiler", "library"):
        monkeypatch.setattr(f"normistral.runtime.kernels.{module}.version", lambda name: "2026.4.2")
    with normistral.load(tiny_int4) as model:
        assert model.capabilities.settings["int4_kernel"] == "openvino"
    assert "pip install openvino==2026.4.1" in name_faster_way({"int4_kernel": "openvino"})
    with pytest.raises(UsageError, match=r"kernel is for OpenVINO 2026\.4\.1, and 2026\.4\.2 is installed"):
        normistral.load(tiny_int4, settings=OURS)


@pytest.mark.parametrize(
    ("cxx", "says"),
    [
        ("true", r"had: normistral build-kernel \(some seconds, once\)"),
        ("no-such", r"apt install g\+\+\), then: normi"),
    ],
)
def test_the_start_and_doctor_name_what_would_be_faster(stored, monkeypatch, cxx, says):
    in_force = {"int4_kernel": "openvino"}
    assert name_faster_way(in_force) is None  # it is there
    assert "for avx" in collect_env._describe_kernel(read_machine())
    assert f"from the store: {stored}" in collect_env._describe_kernel(read_machine())
    stored.unlink()
    monkeypatch.setenv("CXX", cxx)
    assert re.search(says, name_faster_way(in_force))
    assert "OpenVINO's own products, because there is no compiled int4 kernel" in collect_env._describe_kernel(
        read_machine()
    )
    for settings, given in (({"int4_kernel": "normistral"}, {}), (in_force, in_force), ({}, {})):
        assert name_faster_way(settings, given) is None


def test_doctor_says_that_a_kernel_is_the_packages_or_why_it_is_not_used(stored, monkeypatch):
    stored.chmod(0o777)
    assert "others may write" in collect_env._describe_kernel(read_machine())
    monkeypatch.setattr(library, "PACKAGED", stored.parent)
    assert f"came with the package: {stored}" in collect_env._describe_kernel(read_machine())


def test_a_kernel_that_cannot_be_loaded_is_left_out_and_said_so(tiny_int4, stored, caplog):
    """As on a system whose C++ library is too old for it."""
    stored.write_bytes(PLANTED + hashlib.sha256(PLANTED).digest())
    with normistral.load(tiny_int4) as model:
        assert model.capabilities.settings["int4_kernel"] == "openvino"
    assert "cannot load int4-openvino" in caplog.text
    with pytest.raises(EngineError, match="cannot load"):
        normistral.load(tiny_int4, settings=OURS)


# What would be an illegal instruction on the processors that a kernel is for: registers and masks of AVX512, and dot
# products where there are none.
TOO_NEW = {
    "avx2": r"zmm|%k[0-7]|[xyz]mm(1[6-9]|2\d|3[01])|vpdp",
    "avxvnni": r"zmm|%k[0-7]|[xyz]mm(1[6-9]|2\d|3[01])|\t(?!\{vex\} )vpdp|vpdpb[su][su]ds?.*avx_?vnni_int",
    "avx512": r"vdpbf16|vpermb|vpermi2b|vpermt2b|vpmultishiftqb|vpsh[lr]d|vpopcnt|vp2intersect|v\w+ph\s|tdpb",
}


def test_a_kernel_holds_no_instruction_beyond_its_processors(request):
    """With the compiler that is here; the release builds run this test on theirs."""
    if library.find_obstacle(read_machine()) or not shutil.which("c++") or not shutil.which("objdump"):
        pytest.skip("needs a compiler, and objdump")
    for variant, path in request.getfixturevalue("every_kernel").items():
        shown = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
        instructions = [line.split("\t", 2)[-1] for line in shown.splitlines() if line.count("\t") == 2]
        assert len(instructions) > 1000
        assert [one for one in instructions if re.search(TOO_NEW[variant.name], "\t" + one)] == []
        assert any("vpdpbusd" in one for one in instructions) == (variant.name != "avx2")
