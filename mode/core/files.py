"""The files in a run's work folder: their names, the folder's lock, and atomic writes."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, TypeVar

from mode.core.errors import ConfigError

Content = TypeVar("Content")


CURVE = "curve.jsonl"
"""Loss curve of a run."""


AGAIN = "again"
"""Marker of a run that starts over because of `--again`."""


SETTINGS = "run.yaml"
"""Resolved settings of a run."""


WEIGHTS = "weights.safetensors"
"""Trained weights of a run."""


def expand_home(path: str | Path) -> Path:
    """Return a path with `~` replaced by the home folder.

    Raises:
        ConfigError: The path needs a home folder, and there is none.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no such home folder; set HOME, or choose a path without ~") from error


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint that a run writes after a step."""
    return folder / f"checkpoint-{step}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints in the order of their steps."""
    numbers = {path: path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in numbers.items() if step.isdigit()), key=lambda path: int(numbers[path]))


def remove(*paths: Path) -> None:
    """Remove files and folders. Missing files are ignored.

    A folder is renamed before its files are removed, so a crash never leaves part of it under its name.
    """
    for path in paths:
        if path.is_dir():
            hidden = path.with_name(f".{path.name.strip('.').removesuffix('.partial')}.partial")
            if hidden != path:
                shutil.rmtree(hidden, ignore_errors=True)
                os.replace(path, hidden)
            shutil.rmtree(hidden)
        else:
            path.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically: after a crash at any moment it has the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def digest_file(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal.

    A file is read once per process: the digest is kept while the file's size and modification time stay the same.

    Raises:
        OSError: The file cannot be read.
    """
    status = path.stat()
    return digest_content(path, status.st_size, status.st_mtime_ns)


@cache
def digest_content(path: Path, size: int, modified: int) -> str:
    """Return the sha256 of a file that has this size and this modification time in nanoseconds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path, marker: str, write: Callable[[Path], None]) -> None:
    """Make a folder atomically, unless it exists already.

    Args:
        folder: Path of the folder.
        marker: Name of a file in the folder. The folder is complete if this file exists.
        write: Writes the folder under the temporary path that it is given.
    """
    if (folder / marker).exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as work:
        temporary = Path(work) / "new"
        write(temporary)
        try:
            os.replace(temporary, folder)
        except OSError:  # the folder exists: another process was faster, or an earlier process left it incomplete
            if not (folder / marker).exists():
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(temporary, folder)


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


def find_paths(folder: Path, pattern: str) -> list[Path]:
    """Return the paths in a folder that match a glob pattern, sorted. Hidden files are left out.

    Unlike `Path.glob`, this function ignores folders that another process removes meanwhile.
    """
    return sorted(folder / name for name in glob.glob(pattern, root_dir=folder))


def read_existing(paths: Iterable[Path], read: Callable[[Path], Content]) -> list[Content]:
    """Return what a function reads from each path. Files that another process has removed meanwhile are left out."""
    contents = []
    for path in paths:
        try:
            contents.append(read(path))
        except (OSError, ConfigError):
            if path.exists():
                raise
    return contents
