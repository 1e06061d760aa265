"""The lock of a run's folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mode.core.errors import ConfigError
from mode.core.files import PARTIAL, remove

LOCK = "lock"
"""Lock of a run's folder. Its content is the process id of the last process that held it."""


POLL = 0.2
"""Seconds between two attempts to take a lock."""


@contextmanager
def lock_folder(folder: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of a run's folder, so that two processes never train the same run.

    The operating system releases the lock when the process ends. A folder that holds nothing else is removed.

    Args:
        folder: Folder of the run.
        wait: None refuses a folder whose lock another process holds. A function waits for the lock; it is called once,
            with a description of the other process.

    Raises:
        ConfigError: Another process holds the lock, and `wait` is None.
    """
    with take_lock(folder, wait):
        remove(*folder.glob(f".*{PARTIAL}"))  # of killed processes: only the holder of the lock writes here
        try:
            yield
        finally:
            if {path.name for path in folder.iterdir()} <= {LOCK}:
                shutil.rmtree(folder, ignore_errors=True)


def take_lock(folder: Path, wait: Callable[[str], None] | None) -> IO[str]:
    """Return the open lock of a run's folder. Arguments and errors are those of `lock_folder`."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # the process that held the lock has just removed the folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_same_file(lock, path):
                lock.truncate(0)
                print(os.getpid(), file=lock, flush=True)
                return lock
        except BlockingIOError:
            lock.seek(0)
            number = lock.read().strip()
            holder = f"process {number}" if number else "another process"
            if wait is None:
                raise ConfigError(f"{folder}: {holder} is training this run") from None
            wait(holder)
            wait = ignore_holder
            time.sleep(POLL)
        except BaseException:
            lock.close()
            raise
        lock.close()


def ignore_holder(_: str) -> None:
    """Do nothing: the user knows already for whom this process waits."""


def is_same_file(file: IO[str], path: Path) -> bool:
    """Return whether an open file is still the file of that path, which another process may have removed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
