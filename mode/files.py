"""Names of the files in a run's work folder, and writing that a crash cannot cut short."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

CURVE = "curve.jsonl"
AGAIN = "again"
SETTINGS = "run.yaml"
WEIGHTS = "weights.safetensors"


def checkpoint_of(folder: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint after a step."""
    return folder / f"checkpoint-{step}"


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, the latest last."""
    numbers = {path: path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in numbers.items() if step.isdigit()), key=lambda path: int(numbers[path]))


def forget(*paths: Path) -> None:
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


def is_drawn(figure: Path, rendered: Mapping[Path, str], records: Path) -> bool:
    """Say whether a table is rendered already: its texts as they would be, its figure later than every record."""
    same = all(path.exists() and path.read_text("utf-8") == text for path, text in rendered.items())
    latest = max(path.stat().st_mtime_ns for path in records.iterdir())
    return same and figure.exists() and figure.stat().st_mtime_ns > latest
