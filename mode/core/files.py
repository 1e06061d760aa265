"""Names of the files in a work folder, its lock, and writing that a crash cannot cut short."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mode.core.errors import ConfigError

CURVE = "curve.jsonl"


AGAIN = "again"


SETTINGS = "run.yaml"


WEIGHTS = "weights.safetensors"


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint after a step."""
    return folder / f"checkpoint-{step}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, the latest last."""
    numbers = {path: path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in numbers.items() if step.isdigit()), key=lambda path: int(numbers[path]))


def remove(*paths: Path) -> None:
    """Remove files and folders that need not be there; of a folder no part is left under its name."""
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
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def make_folder(folder: Path, made: str, make: Callable[[Path], None]) -> None:
    """Make a folder that appears whole or not at all, unless it is there already.

    Args:
        folder: Its path.
        made: A file in it, by which a whole one is known.
        make: Writes it under another name.
    """
    if (folder / made).exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as work:
        whole = Path(work) / "made"
        make(whole)
        try:
            os.replace(whole, folder)
        except OSError:  # another process was first, or an earlier one left half
            if not (folder / made).exists():
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(whole, folder)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a run's lock, so that two processes never train the same run; the lock goes with the process.

    Raises:
        ConfigError: Another process is at it.
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
