"""Joules from a copy of the kernel's counters."""

import pytest

from normistral.evaluation.bench.machine import EnergyCounter, find_energy_counter

RANGE = 262_143_328_850


def write_package(root, name, count, wrap=RANGE):
    folder = root / "sys/class/powercap" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{count}\n")
    (folder / "max_energy_range_uj").write_text(f"{wrap}\n")
    return folder


def test_packages_are_added_and_their_parts_left_out(tmp_path):
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl-mmio:0"):
        write_package(tmp_path, name, 1_000_000)
    counter = find_energy_counter(tmp_path)
    assert isinstance(counter, EnergyCounter)
    before = counter.read()
    write_package(tmp_path, "intel-rapl:0", 3_500_000)
    write_package(tmp_path, "intel-rapl:1", 2_000_000)
    write_package(tmp_path, "intel-rapl:0:0", 9_000_000)
    assert counter.joules_between(before, counter.read()) == pytest.approx(2.5 + 1.0)


def test_a_counter_that_began_again_is_counted_on(tmp_path):
    write_package(tmp_path, "intel-rapl:0", RANGE - 1_000_000)
    counter = find_energy_counter(tmp_path)
    before = counter.read()
    write_package(tmp_path, "intel-rapl:0", 500_000)
    assert counter.joules_between(before, counter.read()) == pytest.approx(1.5)


def test_no_counter_is_said(tmp_path):
    assert find_energy_counter(tmp_path) == "not exposed by this machine"
    (tmp_path / "sys/class/powercap").mkdir(parents=True)
    assert find_energy_counter(tmp_path) == "not exposed by this machine"


def test_a_counter_for_root_only_is_said(tmp_path, monkeypatch):
    write_package(tmp_path, "intel-rapl:0", 1)

    def refuse(self):
        raise PermissionError

    monkeypatch.setattr(EnergyCounter, "read", refuse)
    assert find_energy_counter(tmp_path) == "not readable by this user"
