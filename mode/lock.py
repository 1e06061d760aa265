"""A lock on a work folder."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mode.checked import ConfigError


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
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
