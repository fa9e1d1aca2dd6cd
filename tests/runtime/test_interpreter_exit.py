"""The interpreter ends, or is interrupted, while threads compute."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from normistral.runtime.interpreter_exit import InterruptSafeLock

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


FORKED = """
import os, signal, sys, threading, time
import normistral

model = normistral.load(sys.argv[1])
model.generate([5, 6, 7], max_new_tokens=1)
begun = threading.Event()

def run():
    for _ in model.stream([5, 6, 7], max_new_tokens=200, ignore_eos=True, draft="off"):
        begun.set()

if sys.argv[2] == "while a thread computes":
    threading.Thread(target=run, daemon=True).start()
    begun.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)  # ends it if it waits
    if sys.argv[2] == "and closes":
        model.close()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert model.generate([5, 6, 7], max_new_tokens=1).token_ids
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("child", ["and does nothing", "and closes", "while a thread computes"])
@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_a_forked_child_ends_and_the_parent_goes_on(folders, engine, child) -> None:
    subprocess.run([sys.executable, "-c", FORKED, str(folders[engine]), child], check=True, timeout=60)


def test_a_lock_is_free_after_an_interrupt_that_came_when_it_was_taken() -> None:
    class Interrupted(InterruptSafeLock):
        def acquire(self, *arguments, **named) -> bool:
            super().acquire(*arguments, **named)
            raise KeyboardInterrupt

    lock, free = Interrupted(), []
    with pytest.raises(KeyboardInterrupt), lock:
        pass
    thread = threading.Thread(target=lambda: free.append(InterruptSafeLock.acquire(lock, blocking=False)))
    thread.start()
    thread.join()
    assert free == [True]


CONTENDED = """
import signal, threading, time
from normistral.runtime.interpreter_exit import InterruptSafeLock

lock = InterruptSafeLock()

def contend():
    while True:
        with lock:
            sum(range(200))

def interrupt(*_):
    raise KeyboardInterrupt

for _ in range(3):
    threading.Thread(target=contend, daemon=True).start()
signal.signal(signal.SIGALRM, interrupt)
for _ in range(300):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        while True:
            with lock:
                sum(range(50))
    except KeyboardInterrupt:
        assert not lock._is_owned()
"""


def test_a_contended_lock_is_free_after_each_of_300_interrupts() -> None:
    """With threading.RLock on Python 3.14, two in three leave it locked."""
    subprocess.run([sys.executable, "-c", CONTENDED], check=True, timeout=60)
