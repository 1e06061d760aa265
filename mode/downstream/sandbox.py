"""Run programs that nobody has read: each in a process that the kernel confines, with limits on all that it can use."""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mode.core.errors import ConfigError

SCRIPT = Path(__file__).with_name("confine.py")


FLAGS = ("-P", "-s", "-S", "-B")
"""With an environment of our own, as isolated as -I, which would also ignore the seed of hashes: with it, what a
program makes of the order of a set is the same every time."""


VERDICT_BYTES = 4096


BLOCK = 4096


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu: Seconds of processor time.
        wall: Seconds in all.
        memory: Bytes of address space.
        file: Bytes of any one file.
        disk: Bytes of all files together, with a block of the disk for each.
    """

    cpu: int = 5
    wall: int = 15
    memory: int = 512 << 20
    file: int = 1 << 20
    disk: int = 16 << 20


LIMITS = Limits()


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        outcome: `passed`; `failed` with an exception; `unparsed`, so never run; `stopped` by a limit of time or disk;
            `ended` before its test did.
        detail: Name of the exception, or what stopped it.
    """

    outcome: Literal["passed", "failed", "unparsed", "stopped", "ended"]
    detail: str = ""


def run_program(program: str, test: str, limits: Limits = LIMITS) -> Verdict:
    """Run a program and then its test in one confined process.

    The process reads the standard library and nothing else, writes an empty folder of its own that goes with it, has no
    network, starts no process or thread, and is killed with its group when its time is over.

    Args:
        program: Python source.
        test: Python source that raises if the program is wrong.
        limits: What it may use.

    Raises:
        ConfigError: This machine cannot confine it; then nothing of it ran.
    """
    word = secrets.token_hex(16)
    request = json.dumps({"word": word, "program": program, "test": test, "limits": asdict(limits)}).encode()
    inlet, outlet = os.pipe()
    with tempfile.TemporaryDirectory(prefix="mode-program-") as folder, os.fdopen(inlet, "rb", buffering=0) as verdict:
        try:
            process = subprocess.Popen(
                [sys.executable, *FLAGS, str(SCRIPT), str(outlet)],
                cwd=folder,
                env={"PYTHONHASHSEED": "0"},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(outlet,),
                start_new_session=True,
            )
        finally:
            os.close(outlet)
        with process:
            try:
                stopped = watch_process(process, request, Path(folder), limits)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        answer = verdict.read(VERDICT_BYTES).decode("utf-8", "replace")
    return parse_verdict(answer, word, stopped or ("time" if process.returncode in LIMIT_SIGNALS else ""))


LIMIT_SIGNALS = (-signal.SIGXCPU, -signal.SIGKILL)


def watch_process(process: subprocess.Popen[bytes], request: bytes, folder: Path, limits: Limits) -> str:
    """Hand a process its request and wait for its end; return the limit that it broke, if it broke one."""
    deadline = time.monotonic() + limits.wall
    assert process.stdin is not None
    try:
        process.stdin.write(request)
        process.stdin.close()
    except BrokenPipeError:  # it died before it read; the missing verdict says so
        pass
    while process.poll() is None:
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                return "time"
            if measure_folder(folder) > limits.disk:
                return "disk"
    return ""


def measure_folder(folder: Path) -> int:
    """Return the bytes that the files of a flat folder take, and a block for each; it is being written to."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                total += BLOCK + entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
    return total


def parse_verdict(answer: str, word: str, stopped: str) -> Verdict:
    """Turn what came through the pipe into a verdict; only a line that begins with the word counts."""
    said = next((line.split(" ", 2)[1:] for line in answer.splitlines() if line.startswith(f"{word} ")), None)
    if said is None:
        return Verdict("stopped", stopped) if stopped else Verdict("ended")
    outcome, detail = said[0], " ".join(said[1:])
    if outcome == "unconfined":
        raise ConfigError(f"this machine cannot confine a program: {detail}")
    if outcome == "passed":
        return Verdict("passed")
    if outcome == "unparsed":
        return Verdict("unparsed")
    return Verdict("failed", detail[:60] if detail.isidentifier() else "")


ESCAPE = """
import os, socket
tries = {
    "reads a file": lambda: open(OUTSIDE).read(),
    "writes a file": lambda: open(OUTSIDE, "w"),
    "opens a socket": lambda: socket.socket(),
    "starts a process": lambda: os.fork(),
    "sends a signal": lambda: os.kill(PARENT, 0),
}
for name, attempt in tries.items():
    try:
        attempt()
    except OSError:
        continue
    raise AssertionError(name)
open("inside", "w").write("written")
"""


def check_isolation() -> None:
    """Prove on this machine, by a program that tries to escape, that programs are confined.

    Raises:
        ConfigError: They are not, and why.
    """
    wanted = "running what a model writes needs Linux 6.2 or newer with Landlock and seccomp"
    if sys.platform != "linux":
        raise ConfigError(f"{wanted}; this is {platform.system()}")
    with tempfile.NamedTemporaryFile(prefix="mode-outside-") as outside:
        try:
            verdict = run_program(f"OUTSIDE, PARENT = {outside.name!r}, {os.getpid()}\n{ESCAPE}", "")
        except ConfigError as error:
            raise ConfigError(f"{wanted}: {error}") from error
    if verdict.outcome != "passed":
        raise ConfigError(
            f"{wanted}; here a program that should be confined {verdict.outcome} {verdict.detail}".strip()
        )
