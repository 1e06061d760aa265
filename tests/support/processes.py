"""Several processes of a test that train one run, as torchrun starts them.

They are forked from one that has imported everything, for to import it takes each of them seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORKS: Any = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.processes", "tests.house.imported"])
LIMIT = 300
"""Seconds that a test's processes may take."""


def together(count: int, program: str, *arguments: str) -> None:
    """Run a program, Python with arguments, on several processes, of one thread each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(count)]
        given = [(shared | {"RANK": str(rank)}, program, arguments, str(log)) for rank, log in enumerate(logs)]
        started = [FORKS.Process(target=run, args=each) for each in given]
        for process in started:
            process.start()
        end = time.monotonic() + LIMIT
        for process in started:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process in started if process.is_alive()]
        for process in late:
            process.kill()
        told = "\n".join(log.read_text("utf-8", errors="replace") for log in logs)
    assert not late, f"not done after {LIMIT} s\n{told}"
    assert [process.exitcode for process in started] == [0] * count, told


def run(environment: dict[str, str], program: str, arguments: tuple[str, ...], log: str) -> None:
    """Be one of the processes."""
    assert "mode.train.loop" in sys.modules, "tests.house.imported could not be imported"
    import torch

    with open(log, "wb") as file:
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    torch.set_num_threads(1)
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<test>", "exec"), {"__name__": "__main__"})


def reload_in_fork(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Load a written model as `mode.artefacts.reload` asks, in a new process that need not import the libraries."""
    with tempfile.NamedTemporaryFile() as log:
        process = FORKS.Process(target=reload, args=(command[-3:], log.name))
        process.start()
        process.join(LIMIT)
        told = Path(log.name).read_text("utf-8", errors="replace")
        return subprocess.CompletedProcess(command, process.exitcode, "", told)


def reload(words: Sequence[str], log: str) -> None:
    """Be the process that loads a written model."""
    import torch

    from mode.artefacts.reload import write_logits

    with open(log, "wb") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    write_logits(*map(Path, words))


def start_command(*words: str) -> Any:
    """Start a command of `mode` in a process of one thread, which prints nothing; return the process."""
    process = FORKS.Process(target=run_command, args=(words,))
    process.start()
    return process


def run_command(words: tuple[str, ...]) -> None:
    """Be a command of `mode`."""
    import torch

    from cli.app import main

    with open(os.devnull, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = ["mode", *words]
    main()


def children_of(number: int) -> list[int]:
    """Return the ids of the child processes of a process."""
    return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text("utf-8").split()]


def ends_soon(number: int, seconds: float = 30) -> bool:
    """Return whether a process ends within some seconds."""
    deadline = time.monotonic() + seconds
    while is_running(number) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(number)


def is_running(number: int) -> bool:
    """Return whether a process has not ended. A process that nobody has waited for has ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text("utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
