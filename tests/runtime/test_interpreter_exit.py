"""The interpreter ends, or is interrupted, while threads compute."""

import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import signal, sys, threading, time
import normistral

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored

model = normistral.load(sys.argv[1])
begun = threading.Semaphore(0)

def run():
    for number, _ in enumerate(model.stream([5, 6, 7], max_new_tokens=200, ignore_eos=True, draft="off")):
        if number == 2:
            begun.release()

def run_again():
    while True:
        try:
            run()
        except normistral.errors.ClosedError:
            return

for _ in range(3):
    threading.Thread(target=run_again, daemon=True).start()
for _ in range(3):
    begun.acquire()
print("begun", flush=True)
"""


@pytest.fixture(scope="module")
def folders(tiny_fp16, tiny_onnx):
    return {"openvino": tiny_fp16, "onnx": tiny_onnx("onnx-fp32-plain")}


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_the_end_of_the_program_stops_threads_that_compute(folders, engine) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(folders[engine])], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert (process.returncode, stderr) == (0, "")


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_an_interrupt_ends_a_program_as_it_ends_others(folders, engine) -> None:
    script = SCRIPT + "\nfor _ in iter(int, 1): run()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folders[engine])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")


def test_a_count_that_an_interrupt_left_behind_holds_nothing_up(folders) -> None:
    """An interrupt may come to the main thread when it has counted a computation and not yet begun it."""
    script = """
import sys
import normistral
from normistral.runtime.interpreter_exit import computing

model = normistral.load(sys.argv[1])
interrupted = computing()
interrupted.__enter__()
"""
    subprocess.run([sys.executable, "-c", script, str(folders["onnx"])], check=True, timeout=30)
