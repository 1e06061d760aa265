"""Commands of `mode` in forked processes, and functions in forked processes.

A process is forked from one that has imported everything, so a command takes a tenth of a second instead of seconds.
The parent must have one thread only: it starts no training and no tokenizer itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 60
"""Seconds of processor time after which a command counts as hanging."""


PATIENCE = 6
"""Wall time of a command that hangs, as a multiple of its processor time: the machine may be busy."""


KEPT = 1 << 20
"""Bytes of a command's output that are kept, from its end."""


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Attributes:
        code: Exit code; negative for a signal; None if the command did not end in time.
        out: Standard output.
        err: Standard error.
    """

    code: int | None
    out: str
    err: str


class Command:
    """A command of `mode` that runs in a forked process."""

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        *,
        seconds: int = LIMIT,
        memory: int | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Start a command.

        Args:
            words: Words of the command line after `mode`.
            folder: Current folder of the process.
            seconds: Limit of its processor time.
            memory: Limit of its address space in bytes.
            before: Called in the process before the command.
        """
        pipes = os.pipe(), os.pipe()  # files would be subject to the limits that trials set
        self.end = time.monotonic() + PATIENCE * seconds
        self.number = os.fork()
        if self.number == 0:
            execute(words, folder, [pipe[1] for pipe in pipes], seconds, memory, before)
        self.pipes = [pipe[0] for pipe in pipes]
        self.texts = [bytearray(), bytearray()]
        for reading, writing in pipes:
            os.close(writing)
            os.set_blocking(reading, False)

    def read(self) -> None:
        """Read what the process has written."""
        for pipe, text in zip(self.pipes, self.texts, strict=True):
            with contextlib.suppress(BlockingIOError):
                while data := os.read(pipe, 1 << 16):
                    text += data
                    del text[: max(0, len(text) - KEPT)]

    def poll(self) -> bool:
        """Return whether the process has ended, and kill it when its time is over."""
        self.read()
        if os.waitid(os.P_PID, self.number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        if time.monotonic() >= self.end:
            self.kill()
        return False

    def kill(self) -> None:
        """Kill the process and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.number, signal.SIGKILL)

    def wait(self) -> Ended:
        """Wait for the end of the process."""
        while not self.poll():
            time.sleep(0.01)
        late = time.monotonic() >= self.end
        self.kill()  # processes that the command has left behind; the command's own has ended, and holds its number
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        self.read()
        for pipe in self.pipes:
            os.close(pipe)
        hangs = code == -signal.SIGXCPU or (late and code == -signal.SIGKILL)
        return Ended(None if hangs else code, *(text.decode("utf-8", "replace") for text in self.texts))


def run_mode(words: Sequence[str], folder: Path, **options: Any) -> Ended:
    """Run a command of `mode` to its end. The options are those of `Command`."""
    return Command(words, folder, **options).wait()


def execute(
    words: Sequence[str],
    folder: Path,
    files: Sequence[int],
    seconds: int,
    memory: int | None,
    before: Callable[[], None],
) -> None:
    """Be the process of a command. Never returns."""
    code = 99
    try:
        end_with_parent()
        os.setsid()
        os.chdir(folder)
        for each in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(files, 1):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", encoding="utf-8") for number in (1, 2))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        sys.argv = ["mode", *words]
        from cli.app import main

        before()
        main()
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Job:
    """A function that runs in a forked process."""

    def __init__(self, function: Callable[[], Any]) -> None:
        """Start the function."""
        self.pipe, outlet = os.pipe()
        self.number = os.fork()
        if self.number == 0:
            end_with_parent()
            os.close(self.pipe)
            try:
                result = pickle.dumps((True, function()))
            except BaseException:
                result = pickle.dumps((False, traceback.format_exc()))
            with os.fdopen(outlet, "wb") as file:
                file.write(result)
            os._exit(0)
        os.close(outlet)

    def fileno(self) -> int:
        """Return the number of the pipe, which can be read when the function has returned."""
        return self.pipe

    def result(self) -> Any:
        """Wait for the function's result.

        Raises:
            RuntimeError: The function raised an exception, or its process died.
        """
        with os.fdopen(self.pipe, "rb") as file:
            data = file.read()
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        fine, value = pickle.loads(data) if data else (False, f"the process ended with {code} and without a result")
        if not fine:
            raise RuntimeError(value)
        return value


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends: an interrupted campaign leaves nothing behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def in_child(function: Callable[[], Any]) -> Any:
    """Call a function in a forked process, and return its result."""
    return Job(function).result()


def first_ready(jobs: Sequence[Job]) -> Job:
    """Wait until one of several functions has returned, and return it."""
    ready: list[Job] = select.select(jobs, [], [])[0]
    return ready[0]


def find_fault(ended: Ended, codes: Sequence[int] = (0, 1, 2)) -> str | None:
    """Return what is wrong with the end of any command: a traceback, a signal, no end, or no word on an error."""
    if ended.code is None:
        return "does not end"
    text = ended.out + ended.err
    if "Traceback (most recent call last)" in text:
        return f"traceback: {last_line(text)}"
    if ended.code not in codes:
        return f"exit code {ended.code}: {last_line(text)}"
    if ended.code and not ended.err.strip():
        return f"exit code {ended.code} without a message"
    return None


def last_line(text: str) -> str:
    """Return the last line of a text that is not empty, cut to a readable length."""
    return (text.strip() or "no output").split("\n")[-1].strip()[:300]


def find_refusal_fault(ended: Ended, names: Sequence[str] = ()) -> str | None:
    """Return what is wrong with a command that must end with code 2 and one line, which has one of some names."""
    if fault := find_fault(ended, (2,)):
        return fault
    line = last_line(ended.err)
    if not line.startswith("mode: "):
        return f"the message is not one line: {line}"
    if names and not any(name in line for name in names):
        return f"the message does not name the file: {line}"
    return None
