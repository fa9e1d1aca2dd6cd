"""The packages that an export works with."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from normistral.export.tools import with_plain_partials

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRIPT = """
import functools
import os
from normistral.export import tools
tools._MODULES["onnx"] = ("torch",)  # whose threads they are; the others take seconds to import
tools.require_export_tools("onnx")
print(os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(("given", "in_force"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_told_otherwise(given, in_force):
    """Spinning ones take the time of whom they wait for, where others use the cores too."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({} if given is None else {"OMP_WAIT_POLICY": given})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert f"OMP_WAIT_POLICY = '{in_force}'" in done.stderr
    assert done.stdout.splitlines()[-1] == str(given)  # the environment is as it was


@pytest.mark.skipif(
    not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text(), reason="this system gives no huge pages"
)
def test_tensors_lie_in_huge_pages():
    """Judged where memory that asks for huge pages by itself gets them: when it is short, there are none to give."""
    counting = (
        "import mmap, resource, torch\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = faults()\n"
        "asking = mmap.mmap(-1, 2**28, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "asking.madvise(mmap.MADV_HUGEPAGE)\n"
        "torch.frombuffer(asking, dtype=torch.float32).fill_(1)\n"  # 2^16 pages of 4 KiB
        "between = faults()\n"
        "torch.zeros(2**26).fill_(1)\n"
        "print(between - before, faults() - between)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + counting], env=environment, capture_output=True, check=True, timeout=120
    )
    of_asking, of_tensor = map(int, done.stdout.split()[-2:])
    if of_asking >= 2**13:
        pytest.skip("this system has no huge pages to give at the moment")
    assert of_tensor < 2**13


class PartialOfPython314(functools.partial):
    """Binds to the instance, as functools.partial does there."""

    def __get__(self, instance, owner=None):
        return self if instance is None else types.MethodType(self, instance)


class OptimumsConfiguration:
    NORMALIZED_CONFIG_CLASS = PartialOfPython314(dict, allow_new=True)

    def __init__(self, config):
        self.normalized = self.NORMALIZED_CONFIG_CLASS(config)


def test_optimums_configurations_are_made_of_the_model_alone_on_any_python():
    with pytest.raises(TypeError):
        OptimumsConfiguration([("heads", 8)])
    made = with_plain_partials(OptimumsConfiguration)([("heads", 8)])
    assert made.normalized == {"heads": 8, "allow_new": True}
    assert isinstance(made, OptimumsConfiguration)
    assert type(made).__name__ == "OptimumsConfiguration"
