"""Calls that change files, counted and made to fail by the library in calls.c."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

COUNT, KILL, FULL = 1, 2, 3
SOURCE = Path(__file__).with_name("calls.c")


def build_library(folder: Path) -> Path | None:
    """Compile the library, and return its path; None if this machine cannot compile it."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        return None
    path = folder / "calls.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(path), str(SOURCE), "-ldl"]
    return path if subprocess.run(command, check=False).returncode == 0 else None


def preload(library: Path) -> NoReturn:
    """Start this program again with the library loaded."""
    os.environ["LD_PRELOAD"] = str(library)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def is_loaded() -> bool:
    """Return whether the library is loaded."""
    return hasattr(ctypes.CDLL(None), "campaign_arm")


def arm(folder: Path, action: int, number: int = 0, log: Path | None = None) -> None:
    """Watch the calls of this process that change files below a folder.

    Args:
        folder: The folder.
        action: COUNT writes the calls to a log; KILL kills the process at one of them; FULL fills the disk.
        number: The call of KILL, or the first one of FULL.
        log: File for COUNT.
    """
    ctypes.CDLL(None).campaign_arm(os.fsencode(folder), action, ctypes.c_long(number), os.fsencode(log or os.devnull))


def read_log(log: Path) -> list[tuple[str, bool, Path]]:
    """Return the calls of a log: name, whether the call needs space, and path."""
    lines = (line.split(" ", 2) for line in log.read_text("utf-8").splitlines())
    return [(name, grows == "1", Path(path)) for name, grows, path in lines]
