"""Run untrusted programs, each in a process that the kernel confines, with limits on all resources."""

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
"""Flags of the interpreter. With an empty environment they isolate as -I does. Unlike -I, they keep PYTHONHASHSEED, so
that the order of a set is the same in every run."""


VERDICT_BYTES = 4096
"""Maximum number of bytes that are read from the pipe."""


BLOCK = 4096
"""Bytes of a block of the disk."""


@dataclass(frozen=True)
class Limits:
    """Limits on the resources of a program.

    Attributes:
        cpu: Seconds of processor time.
        wall: Seconds of wall time.
        memory: Bytes of address space.
        file: Bytes of one file.
        disk: Bytes of all files together, plus one block of the disk per file.
    """

    cpu: int = 5
    wall: int = 15
    memory: int = 512 << 20
    file: int = 1 << 20
    disk: int = 16 << 20


LIMITS = Limits()


@dataclass(frozen=True)
class Verdict:
    """Verdict on a program.

    Attributes:
        outcome: `passed`; `failed` with an exception; `unparsed`, if the source is not valid Python; `stopped` by the
            limit of time or disk; `ended`, if the process ended before the test did.
        detail: Name of the exception, or of the limit.
    """

    outcome: Literal["passed", "failed", "unparsed", "stopped", "ended"]
    detail: str = ""


def run_program(program: str, test: str, limits: Limits = LIMITS) -> Verdict:
    """Run a program and then its test in one confined process.

    The process can read only the standard library and write only a temporary folder. The process has no network and
    starts no process or thread. When its time is over, the process is killed with its group.

    Args:
        program: Python source.
        test: Python source that raises an exception if the program is wrong.
        limits: Limits on resources.

    Raises:
        ConfigError: This machine cannot confine the process. The program did not run.
    """
    secret = secrets.token_hex(16)
    asked = {"secret": secret, "parent": os.getpid(), "program": program, "test": test, "limits": asdict(limits)}
    request = json.dumps(asked).encode()
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
        output = verdict.read(VERDICT_BYTES).decode("utf-8", "replace")
    return parse_verdict(output, secret, stopped or ("time" if process.returncode in LIMIT_SIGNALS else ""))


LIMIT_SIGNALS = (-signal.SIGXCPU, -signal.SIGKILL)
"""Exit codes of a process that exceeded its processor time."""


def watch_process(process: subprocess.Popen[bytes], request: bytes, folder: Path, limits: Limits) -> str:
    """Send a process its request and wait for its end; return the limit that it exceeded, or an empty text."""
    deadline = time.monotonic() + limits.wall
    assert process.stdin is not None
    try:
        process.stdin.write(request)
        process.stdin.close()
    except BrokenPipeError:  # the process died before it read the request: there will be no verdict
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
    """Return the bytes of the files in a flat folder, plus a block per file. Files may vanish while they are read."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                total += BLOCK + entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
    return total


def parse_verdict(output: str, secret: str, stopped: str) -> Verdict:
    """Parse the output of the pipe. Only lines that start with the secret count.

    The first line is written before the program runs. No later line can say that the process was not confined.

    Args:
        output: Output of the pipe.
        secret: Secret of the request.
        stopped: Limit that the process exceeded, or an empty text.

    Raises:
        ConfigError: The process could not be confined, so the program did not run.
    """
    lines = [line.split(" ", 2)[1:] for line in output.split("\n") if line.startswith(f"{secret} ")]
    if not lines or lines[0] != ["confined"]:
        reason = (
            lines[0][-1] if lines else f"the process {'was too slow to start' if stopped else 'ended at its start'}"
        )
        raise ConfigError(f"this machine cannot confine a program: {reason}")
    if len(lines) == 1:
        return Verdict("stopped", stopped) if stopped else Verdict("ended")
    outcome, detail = lines[1][0], " ".join(lines[1][1:])
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
"""A program that raises if any attempt to escape succeeds, or if it cannot write its own folder."""


def check_isolation() -> None:
    """Check, with a program that tries to escape, that this machine confines programs.

    Raises:
        ConfigError: This machine does not confine programs.
    """
    wanted = "running programs of a model needs Linux 6.2 or newer with Landlock and seccomp"
    if sys.platform != "linux":
        raise ConfigError(f"{wanted}; this is {platform.system()}")
    with tempfile.NamedTemporaryFile(prefix="mode-outside-") as outside:
        try:
            verdict = run_program(f"OUTSIDE, PARENT = {outside.name!r}, {os.getpid()}\n{ESCAPE}", "")
        except ConfigError as error:
            raise ConfigError(f"{wanted}: {error}") from error
    if verdict.outcome != "passed":
        raise ConfigError(f"{wanted}; the test of the confinement {verdict.outcome}: {verdict.detail}".rstrip(": "))
