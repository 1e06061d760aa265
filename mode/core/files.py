"""The files in a run's work folder and their names, atomic writes, and what killed processes leave behind."""

from __future__ import annotations

import errno
import glob
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

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


PARTIAL = ".partial"
"""Suffix of files and folders that are being written."""


HOST = os.uname().nodename
"""Name of this machine."""


OWN = re.compile(rf"\.(?P<name>.+)\.{re.escape(HOST)}-(?P<pid>\d+)-\d+{re.escape(PARTIAL)}")
"""Names of the files and folders that processes of this machine are writing, or left when they were killed."""


_numbers = itertools.count()
"""Numbers of the files that this process writes, so that two threads never share a name."""


A_DAY = 24 * 60 * 60.0
"""Seconds after which a half-written file of another machine is taken to be abandoned."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write for which the disk, a quota or a limit on files has no room."""


def expand_home(path: str | Path) -> Path:
    """Return a path with `~` replaced by the home folder.

    Raises:
        ConfigError: The path needs a home folder, and there is none.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no such home folder; set HOME, or choose a path without ~") from error


def locate_checkpoint(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint that a run writes after a step."""
    return folder / f"checkpoint-{step}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints in the order of their steps."""
    found = {path: re.fullmatch(r"checkpoint-([0-9]+)", path.name) for path in folder.glob("checkpoint-*")}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=lambda path: steps[path])


def remove(*paths: Path) -> None:
    """Remove files and folders. Missing files are ignored.

    A folder is renamed before its files are removed, so a crash never leaves part of it under its name.
    """
    for path in paths:
        if path.is_dir():
            hidden = path
            if not path.name.endswith(PARTIAL):
                os.replace(path, hidden := make_partial_path(path))
            shutil.rmtree(hidden)
        else:
            path.unlink(missing_ok=True)


def make_partial_path(path: Path) -> Path:
    """Return a new path beside a file or a folder, under which this process writes it."""
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}-{next(_numbers)}{PARTIAL}")


def remove_leftovers(folder: Path) -> None:
    """Remove the files and folders that killed processes left half-written in a folder.

    The name of such a file has the machine and the id of its process. A file of a living process stays. A file of
    another machine, whose processes are not visible here, is removed a day after its last change.
    """
    with suppress(OSError):  # the folder is missing or not readable
        for entry in list(os.scandir(folder)):
            if not entry.name.startswith(".partial-") and not (entry.name[0] == "." and entry.name.endswith(PARTIAL)):
                continue
            with suppress(OSError):  # another process removed the file first, or the folder is not writable
                if match := OWN.fullmatch(entry.name):
                    dead = not is_alive(int(match["pid"]))
                else:
                    dead = time.time() - entry.stat(follow_symlinks=False).st_mtime > A_DAY
                if dead:
                    remove(Path(entry.path))


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine is alive."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def write_partial(path: Path, size: int) -> Iterator[Path]:
    """Yield the path under which this process writes a file or a folder before it renames it to `path`.

    What the block leaves under this path is removed at its end, as are the leftovers of killed processes.

    Args:
        path: The file or folder to write. Its parent exists.
        size: Number of bytes that the block writes, for the message of a full disk.

    Raises:
        ConfigError: The disk is full.
    """
    remove_leftovers(path.parent)
    partial = make_partial_path(path)
    with reporting_full_disk(path, size):
        try:
            yield partial
        finally:
            remove(partial)


@contextmanager
def reporting_full_disk(path: Path, size: int) -> Iterator[None]:
    """Report a full disk with the path that was written, the bytes that it needs, and those that were free before.

    Args:
        path: The file or folder that the block writes.
        size: Number of bytes that it needs.

    Raises:
        ConfigError: The disk is full.
    """
    free = measure_free_space(path)
    try:
        yield
    except Exception as error:
        if reason := find_full_disk(error):
            raise full_disk_error(path, reason, size, free) from error
        raise


def find_full_disk(error: BaseException) -> str | None:
    """Return why a write failed if the disk, a quota or a limit on files is exhausted; else None."""
    numbers = [n for n in FULL if getattr(error, "errno", None) == n or f"os error {n})" in str(error)]
    return os.strerror(numbers[0]) if numbers else None


def full_disk_error(path: Path, reason: str, size: int, free: int) -> ConfigError:
    """Return the error of a file or folder that the disk has no space for."""
    match = OWN.fullmatch(path.name)
    shown = path.with_name(match["name"]) if match else path
    needed = f"{format_bytes(size)} needed, {format_bytes(free)} free"
    return ConfigError(f"{shown}: cannot be written: {reason} ({needed}); make space and repeat the command")


def measure_free_space(path: Path) -> int:
    """Return the free bytes of the disk of a path that need not exist."""
    there = next((each for each in path.absolute().parents if each.is_dir()), Path("/"))
    return shutil.disk_usage(there).free


def format_bytes(size: float) -> str:
    """Render a number of bytes.

    >>> format_bytes(312), format_bytes(1_234_567)
    ('312 bytes', '1.2 MB')
    """
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:.0f} bytes"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically: after a crash at any moment it has the old content or the new, never a part.

    Raises:
        ConfigError: The disk is full.
    """
    with write_partial(path, len(data)) as partial:
        write_synced(partial, data)
        os.replace(partial, path)


def write_synced(path: Path, data: Any) -> None:
    """Write bytes, or the bytes of an array, to a file and wait until they are on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_files(folder: Path) -> None:
    """Wait until all files of a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConfigError: The file is missing, not UTF-8 text, not JSON, not an object, or nested too deeply.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ConfigError(f"{path}: not readable: nested too deeply") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return content


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
