"""How long runs will take, by the seconds of records of equal runs, or by operations at the speed of similar ones."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mode.config import identity
from mode.config.run import Run
from mode.records.record import Record
from mode.runs.forecast import forecast
from mode.tables.select import remove_seed


@dataclass(frozen=True)
class Duration:
    """An estimate of the time that runs take.

    Attributes:
        seconds: Estimated seconds of all runs that have an estimate, with several at a time.
        runs: Number of runs.
        unknown: Number of runs without an estimate.
        processor: Processor of most of the records used.
    """

    seconds: float
    runs: int
    unknown: int
    processor: str


def estimate_duration(runs: Sequence[Run], records: Iterable[Record], jobs: int) -> Duration | None:
    """Return an estimate of the time of runs, without the earlier stages that they need.

    A run takes the median seconds of training and scoring of the records with its settings and any seed. Without one,
    it takes its operations at the median speed of all records of its backbone, and their median seconds of scoring.

    Args:
        runs: The runs.
        records: Records of finished runs, such as the published ones.
        jobs: Number of runs at a time.

    Returns:
        The estimate; None if no run has one.
    """
    equal: dict[str, list[Record]] = {}
    similar: dict[str, list[Record]] = {}
    for record in records:
        equal.setdefault(make_key(record.asked), []).append(record)
        similar.setdefault(record.asked["backbone"]["name"], []).append(record)
    known: list[float] = []
    used: Counter[str] = Counter()
    for run in runs:
        name = run.backbone.name
        scoring = find_median(record.outcome.evaluation_seconds for record in similar.get(name, ())) or 0.0
        alike = equal.get(make_key(identity.describe_run(run) | {"backbone": {"name": name}}), [])
        if not alike:
            alike = [record for record in similar.get(name, ()) if record.outcome.flops and record.outcome.seconds]
            seconds = scale_operations(run, alike)
        else:
            seconds = statistics.median(record.outcome.seconds for record in alike)
            scoring = find_median(record.outcome.evaluation_seconds for record in alike) or scoring
        if seconds is not None:
            known.append(seconds + scoring)
            used.update(str(record.origin.machine.get("processor")) for record in alike)
    if not known:
        return None
    together = max(sum(known) / jobs, max(known))
    return Duration(together, len(runs), len(runs) - len(known), used.most_common(1)[0][0])


def make_key(asked: dict[str, object]) -> str:
    """Return the settings of a run without its seed as text."""
    return json.dumps(remove_seed(asked), sort_keys=True, default=str)


def scale_operations(run: Run, records: Sequence[Record]) -> float | None:
    """Return the seconds of a run's operations at the median speed of records; None if either is unknown."""
    expected = forecast(run)
    speed = find_median(record.outcome.flops / record.outcome.seconds for record in records if record.outcome.flops)
    return None if expected is None or speed is None else expected.flops / speed


def find_median(values: Iterable[float | None]) -> float | None:
    """Return the median of the known values; None if none is known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
