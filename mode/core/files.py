"""The files in a run's work folder: their names, the folder's lock, and atomic writes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from mode.core.errors import ConfigError

CURVE = "curve.jsonl"
"""Loss curve of a run."""


AGAIN = "again"
"""Marker of a run that starts over because of `--again`."""


SETTINGS = "run.yaml"
"""Resolved settings of a run."""


WEIGHTS = "weights.safetensors"
"""Trained weights of a run."""


def checkpoint_folder(folder: Path, step: int) -> Path:
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


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, so that two processes never train the same run.

    The operating system releases the lock when the process ends. A folder that holds nothing else is removed.

    Raises:
        ConfigError: Another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{folder}: another process is training this run") from error
        try:
            yield
        finally:
            if all(path.name == "lock" for path in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
