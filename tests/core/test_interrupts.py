"""An interrupt ends a command wherever it arrives, and child processes end with their parent."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mode.core.interrupts import PARENT, SIGNALS, blocking_interrupts, raising_interrupts
from tests.support.processes import children_of, ends_soon, is_running

SECONDS = 60
"""Seconds that a test waits for another process."""


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@contextmanager
def interrupted() -> Iterator[None]:
    """Expect that a signal interrupts this context."""
    with pytest.raises(KeyboardInterrupt), raising_interrupts():
        yield


def wait_long() -> None:
    """Wait until an interrupt arrives."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.01)
    raise AssertionError("no interrupt arrived")


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_interrupts_and_its_handler_is_restored(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (*SIGNALS, signal.SIGALRM)}
    with interrupted():
        send(number)
        wait_long()
    assert {each: signal.getsignal(each) for each in before} == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    with raising_interrupts():
        pass


class Destructor:
    """Sends a signal in its destructor, where Python discards every exception."""

    def __del__(self) -> None:
        send(signal.SIGINT)
        sum(range(1000))  # the handler runs here


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_in_a_destructor_is_not_lost() -> None:
    with interrupted():
        Destructor()
        gc.collect()
        wait_long()


def test_an_interrupt_that_a_library_discards_is_not_lost() -> None:
    with interrupted():
        try:
            send(signal.SIGINT)
            wait_long()
        except BaseException:  # as libraries do around optional imports
            pass
        wait_long()


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_an_interrupt_that_becomes_another_error_is_an_interrupt(error: type[BaseException]) -> None:
    with interrupted():
        try:
            send(signal.SIGINT)
            wait_long()
        except BaseException as caught:
            raise error from caught


def test_a_block_that_ends_before_the_interrupt_is_raised_again_was_interrupted() -> None:
    with interrupted():
        try:
            send(signal.SIGTERM)
            wait_long()
        except KeyboardInterrupt:
            pass


def test_cleaning_up_after_an_interrupt_is_not_interrupted() -> None:
    cleaned = False
    with interrupted():
        try:
            send(signal.SIGINT)
            wait_long()
        finally:
            time.sleep(0.5)
            cleaned = True
    assert cleaned


def test_a_signal_that_is_ignored_from_the_start_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with raising_interrupts():
            send(signal.SIGHUP)
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_at_the_start_of_a_process_is_delayed_and_not_lost() -> None:
    after = False
    with interrupted():
        with blocking_interrupts():
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # to no other thread of the tests
            time.sleep(0.05)
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            child.send_signal(signal.SIGINT)
            time.sleep(0.2)
            assert child.poll() is None  # only this process handles Ctrl-C
            child.kill()
            child.wait()
            after = True
        wait_long()
    assert after


LAUNCHER = f"""
import os, subprocess, sys
os.environ[{PARENT!r}] = str(os.getpid())
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
DIRECT = """
import sys, time
from mode.core.interrupts import end_with_launcher
time.sleep(float(sys.argv[1]) if len(sys.argv) > 1 else 0)
end_with_launcher()
print("started", flush=True)
time.sleep(600)
"""
POOL = """
import multiprocessing, os, time
from mode.core.interrupts import end_with_parent

def work():
    end_with_parent()
    os.write(1, b"started\\n")  # in one piece; print may write the end of a line apart
    while True:
        sum(range(10000))  # busy, as a run is

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=work, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    os.write(1, f"{processes[0].pid} {processes[1].pid}\\n".encode())
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the signal")
def test_a_process_of_a_launcher_ends_when_the_launcher_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, DIRECT], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "started\n"
        (child,) = children_of(launcher.pid)
        launcher.kill()
        assert launcher.stdout.read() == ""  # the child has ended too: it held the pipe
    assert ends_soon(child)


def test_a_process_whose_launcher_has_ended_before_ends_at_once() -> None:
    environment = os.environ | {PARENT: "1" if os.getpid() != 1 else "2"}
    command = [sys.executable, "-c", DIRECT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_children_of_a_fork_server_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL, encoding="utf-8")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        lines = [parent.stdout.readline() for _ in range(3)]
        assert lines.count("started\n") == 2
        children = [int(word) for line in lines if line != "started\n" for word in line.split()]
        assert all(map(is_running, children))
        parent.kill()
        assert parent.stdout.read() == ""
    assert all(map(ends_soon, children))


@pytest.mark.slow
def test_a_run_that_is_interrupted_again_and_again_ends_bit_identical() -> None:
    """The runs are forked from a process of its own. `python -m tests.support.interrupts 100` sends more signals."""
    command = [sys.executable, "-m", "tests.support.interrupts", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = Counter(line.split()[1] for line in done.stdout.splitlines() if line.startswith("SIG"))
    assert seen["stopped"] >= 3, done.stdout
