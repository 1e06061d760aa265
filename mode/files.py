"""Names of the files in a run's work folder, and writing that a crash cannot cut short."""

from __future__ import annotations

import os
from pathlib import Path

CHECKPOINT = "checkpoint.safetensors"
CURVE = "curve.jsonl"
AGAIN = "again"
SETTINGS = "run.yaml"
WEIGHTS = "weights.safetensors"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
