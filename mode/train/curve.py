"""The training curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mode.config.train import Train

Point = dict[str, Any]
"""A point of the training curve: step, loss, accuracy, lr, seconds, validation scores and the method's own values."""


def read_curve(path: Path) -> list[Point]:
    """Read a training curve, up to the first line that is incomplete after a crash."""
    points: list[Point] = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            points.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return points


def compute_throughput(curve: Sequence[Point], settings: Train) -> float:
    """Return the tokens per second between the last two points of a curve."""
    last, before = curve[-1], curve[-2] if len(curve) > 1 else {"step": 0, "seconds": 0.0}
    steps, seconds = last["step"] - before["step"], last["seconds"] - before["seconds"]
    return float(steps * settings.batch.size * settings.sequence_length / max(seconds, 1e-9))
