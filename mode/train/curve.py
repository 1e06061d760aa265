"""The training curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mode.config.train import Train
from mode.core.files import reporting_full_disk, write_atomic

Point = dict[str, Any]
"""A point of the training curve: step, loss, accuracy, lr, seconds, validation scores and the method's own values."""


def read_curve(path: Path) -> list[Point]:
    """Read a training curve, up to the first line that is incomplete after a crash."""
    points: list[Point] = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            point = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(point, dict) or not isinstance(point.get("step"), int):
            break
        points.append(point)
    return points


def append_point(path: Path, point: Point) -> None:
    """Append a point to a training curve.

    Raises:
        ConfigError: The disk is full.
    """
    line = json.dumps(point) + "\n"
    with reporting_full_disk(path, len(line)), path.open("a", encoding="utf-8") as file:
        file.write(line)


def write_curve(path: Path, curve: Sequence[Point]) -> None:
    """Write a whole training curve, with the same bytes as `append_point`.

    Raises:
        ConfigError: The disk is full.
    """
    write_atomic(path, "".join(json.dumps(point) + "\n" for point in curve).encode())


def is_whole(curve: Sequence[Point], step: int) -> bool:
    """Return whether the steps of a curve increase up to exactly this step, which every checkpoint's curve does."""
    steps = [point["step"] for point in curve]
    return steps == sorted(set(steps)) and steps[-1:] == [step]


def compute_throughput(curve: Sequence[Point], settings: Train) -> float:
    """Return the tokens per second between the last two points of a curve."""
    last, before = curve[-1], curve[-2] if len(curve) > 1 else {"step": 0, "seconds": 0.0}
    steps, seconds = last["step"] - before["step"], last["seconds"] - before["seconds"]
    return float(steps * settings.batch.size * settings.sequence_length / max(seconds, 1e-9))
