"""Compile a table from records: one line per row, with quality per seed and the cost of every stage."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mode.config.compose import parse_overrides
from mode.records.contents import Outcome
from mode.records.metrics import ACCURACY, Metric, find_metrics
from mode.records.record import Record
from mode.tables.columns import AVERAGE, RETENTION, TARGET, Column, parse_column
from mode.tables.select import add_needed, select
from mode.tables.statistics import Interval, effective_size, interval_over_documents, interval_over_seeds, resample
from mode.tables.table import Table, compose_rows, select_rows

BACKBONE = "backbone"
"""Row of the untouched backbone."""


Number = TypeVar("Number", float, NDArray[np.float64])
"""A quality, or the same in every resample."""


def average(values: Sequence[Number]) -> Number:
    """Return the mean of numbers, or of arrays element by element."""
    total: Number = sum(values[1:], start=values[0]) / len(values)
    return total


@dataclass(frozen=True)
class Cell:
    """Mean and sample standard deviation over seeds."""

    mean: float
    std: float
    n: int

    def text(self, *, signed: bool = False, decimals: int = 2) -> str:
        """Render the cell.

        >>> Cell(1.234, 0.1, 3).text(), Cell(1.234, math.nan, 1).text(signed=True)
        ('1.23 ± 0.10', '+1.23')
        """
        mean = f"{self.mean:{'+' if signed else ''}.{decimals}f}"
        return mean if self.n < 2 else f"{mean} ± {self.std:.{decimals}f}"


def summarise_seeds(values: Sequence[float]) -> Cell | None:
    """Summarise the values of several seeds; None without any."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else math.nan
    return Cell(statistics.fmean(values), std, len(values))


@dataclass(frozen=True)
class Difference:
    """A paired difference between two rows.

    Attributes:
        cell: Its mean and deviation over seeds.
        documents: Its interval over documents, of the mean over seeds; None where the records have no sums over them.
        seeds: Its interval over seeds; None with a single one.
    """

    cell: Cell
    documents: Interval | None
    seeds: Interval | None

    @property
    def holds(self) -> bool:
        """Whether neither the choice of documents nor, where there are several, that of seeds explains it."""
        return (
            self.documents is not None
            and self.documents.excludes_zero
            and (self.seeds is None or self.seeds.excludes_zero)
        )


def read_routing(records: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Return, by domain, how many branches tokens had and how even their weights were; empty if unknown."""
    found = [record.outcome.gates for record in records]
    if not records or not all(each.active is not None for gates in found for each in gates.values()):
        return {}
    return {
        domain: (
            statistics.fmean(active for gates in found for active in gates[domain].active or ()),
            statistics.fmean(
                entropy / math.log(len(mean)) if len(mean) > 1 else 1.0
                for gates in found
                for mean, entropy in zip(gates[domain].mean, gates[domain].entropy or (), strict=True)
            ),
        )
        for domain in found[0]
    }


def differs_from_forecast(outcome: Outcome) -> bool:
    """Say whether what a run trained on, or took, differs from its forecast by more than one per cent."""
    expected = outcome.forecast
    if expected is None or outcome.flops is None:
        return False
    pairs = ((outcome.tokens, expected.tokens), (outcome.flops, expected.flops))
    return any(abs(found - forecast) > 0.01 * forecast for found, forecast in pairs)


@dataclass(frozen=True)
class RowResult:
    """One row of a table, computed from its records.

    Attributes:
        name: Row name.
        label: What people read.
        quality: Per seed, by column name: every metric of every domain, of their average, of the targets, and as
            retention, in the unit shown.
        resampled: The same in every resample of the documents, where the records have sums over documents.
        documents: Effective documents by domain, `average`, `target` and `retention`; what rests on several domains
            counts as the one with the fewest.
        cost: Parameters in millions, `train.batch.examples`, share and weight of an anchor; steps, tokens in millions,
            1e12 operations, seconds and tokens a second over all stages; peak memory in GB, MB that one domain adds on
            disk; n.
        gates: By domain, every block's mean gate weights over seeds, the backbone's first; empty without gates.
        routing: By domain, the mean number of branches in use and the mean entropy as a share of the largest.
        branches: Names of the branches.
        astray: Whether a stage trained on, or took, something else than its forecast.
        runs: Id of every seed's run.
    """

    name: str
    label: str
    quality: Mapping[int, Mapping[str, float]]
    resampled: Mapping[int, Mapping[str, NDArray[np.float64]]]
    documents: Mapping[str, float]
    cost: Mapping[str, float]
    gates: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    routing: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    branches: tuple[str, ...] = ()
    astray: bool = False
    runs: Mapping[int, str] = field(default_factory=dict)

    def cell(self, column: str) -> Cell | None:
        """Return a column's mean and deviation over seeds."""
        return summarise_seeds([values[column] for values in self.quality.values() if column in values])

    def minus(self, other: RowResult, column: str) -> Difference | None:
        """Return the paired difference to another row over the seeds that both have."""
        both = [
            seed for seed, values in self.quality.items() if column in values and column in other.quality.get(seed, {})
        ]
        summary = summarise_seeds([self.quality[seed][column] - other.quality[seed][column] for seed in both])
        if summary is None:
            return None
        documents = None
        if all(column in row.resampled[seed] for row in (self, other) for seed in both):
            resamples = [self.resampled[seed][column] - other.resampled[seed][column] for seed in both]
            documents = interval_over_documents(summary.mean, resamples, self.documents[parse_column(column).part])
        seeds = interval_over_seeds([self.quality[seed][column] - other.quality[seed][column] for seed in both])
        return Difference(summary, documents, seeds)


def find_contamination(first: Record, records: Sequence[Record]) -> dict[str, dict[str, float | None]]:
    """Return what any record under the conditions of a table's says of its split; earlier records do not say it."""
    for record in records:
        found = record.outcome.contamination
        if found and record.conditions == first.conditions and record.outcome.split == first.outcome.split:
            return {name: dict(found[name]) for name in first.outcome.scores}
    return {}


@dataclass(frozen=True)
class TableData:
    """A table compiled from records: its lines, its domains in order, the split scored, and what to beware of.

    `targets` are those of all rows, and empty where rows have different ones. `contamination` is, by domain scored, the
    share of its n-grams by where in training they occur; empty where no record says it.
    """

    table: Table
    lines: tuple[RowResult, ...]
    domains: tuple[str, ...]
    targets: tuple[str, ...]
    split: str
    left_out: int
    overlap: tuple[str, ...]
    contamination: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    def line(self, name: str) -> RowResult:
        """Return a line by row name."""
        return next(line for line in self.lines if line.name == name)

    @property
    def says_something(self) -> bool:
        """Whether there is a record of anything but the untouched backbone."""
        return any(line.quality for line in self.lines if line.name != BACKBONE)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics shown, in order."""
        return find_metrics(self.table.metrics)

    @property
    def columns(self) -> list[Column]:
        """Quality columns in order."""
        return [Column(part, metric) for metric in self.metrics for part in (*self.domains, AVERAGE, RETENTION)]


def compile_table(table: Table, records: Sequence[Record], overrides: Sequence[str], extra: Path | None) -> TableData:
    """Compile a table from records."""
    runs = compose_rows(table, overrides, extra)
    table = select_rows(table, runs)
    alike = [record for record in records if not table.settles or record.seed in table.seeds]
    chosen, left_out = select(runs, alike)
    by_id = {record.id: record for record in records}
    first = next((record for found in chosen.values() for record in found), None)
    domains = tuple(first.outcome.scores) if first else ()
    several = {record.request.targets for found in chosen.values() for record in found}
    targets = several.pop() if len(several) == 1 else ()
    chosen_by = [item for item in parse_overrides(overrides) if item.key in ("budget", "experiment")]
    under = [f"{item.key}={item.value}" for item in chosen_by if item.value is not None]
    table = replace(table, title=" ".join([table.title, *([f"({', '.join(under)})"] if under else [])]))
    bare = chosen.get(BACKBONE) or []
    lines = tuple(
        compute_row(row.name, table.marked(row), chosen[row.name], bare[0] if bare else None, by_id, table.needed)
        for row in table.rows
    )
    return TableData(
        table=table,
        lines=lines,
        domains=domains,
        targets=targets,
        split=first.outcome.split if first else "test",
        left_out=left_out,
        overlap=first.overlap if first else (),
        contamination=find_contamination(first, records) if first else {},
    )


def compute_row(
    name: str,
    label: str,
    records: Sequence[Record],
    bare: Record | None,
    by_id: Mapping[str, Record],
    metrics: Sequence[Metric],
) -> RowResult:
    """Compute one line. Cost counts every stage a row stands on, since whoever starts from nothing pays for all."""
    quality = {record.seed: compute_qualities(record, bare, metrics) for record in records}
    costs = [[stage.outcome for stage in add_needed(record, by_id)] for record in records]
    return RowResult(
        name=name,
        label=label,
        quality=quality,
        resampled={record.seed: resample_qualities(record, bare, metrics) for record in records},
        documents=count_effective_documents(records[0]) if records else {},
        cost={"n": len(records), **(compute_row_cost(records[0], costs) if records else {})},
        gates=average_gates(records),
        routing=read_routing(records),
        branches=records[0].outcome.branches if records else (),
        astray=any(differs_from_forecast(stage) for stages in costs for stage in stages),
        runs={record.seed: record.id for record in records},
    )


def compute_row_cost(record: Record, costs: Sequence[Sequence[Outcome]]) -> dict[str, float]:
    """Return what a row costs; earlier records do not say all of it.

    Args:
        record: The record of one seed.
        costs: By seed, the outcome of every stage; the row's own stage first.
    """
    outcome, stages = record.outcome, costs[0]
    cost: dict[str, float] = {"total": outcome.parameters.total / 1e6, "added": outcome.parameters.added / 1e6}
    cost["trainable"] = max(stage.parameters.trainable for stage in stages) / 1e6
    if outcome.forecast is not None:
        cost["active"] = outcome.forecast.active / 1e6
    if record.request.examples is not None:
        cost["examples"] = record.request.examples
    if record.request.anchor is not None:
        cost |= record.request.anchor
    cost["steps"] = sum(stage.steps for stage in stages)
    cost["tokens"] = sum(stage.tokens for stage in stages) / 1e6
    operations = [stage.flops for stage in stages if stage.flops is not None]
    if len(operations) == len(stages):
        cost["flops"] = sum(operations) / 1e12
    cost["seconds"] = statistics.fmean(sum(stage.seconds for stage in each) for each in costs)
    if cost["seconds"]:
        cost["rate"] = 1e6 * cost["tokens"] / cost["seconds"]
    peaks = [stage.peak_memory_bytes for each in costs for stage in each]
    if None not in peaks:
        cost["memory"] = max(peak for peak in peaks if peak is not None) / 1e9
    kept = stages[-1].kept_bytes  # an earlier stage is one domain's, where there is one
    if kept is not None:
        cost["domain"] = kept / 1e6
    return cost


def average_gates(records: Sequence[Record]) -> dict[str, list[list[float]]]:
    """Return, by domain, the mean over records of every block's gate weights; empty where a record has none."""
    found = [record.outcome.gates for record in records]
    if not records or not all(found):
        return {}
    return {
        domain: [
            [statistics.fmean(seeds) for seeds in zip(*branches, strict=True)]
            for branches in zip(*(gates[domain].mean for gates in found), strict=True)
        ]
        for domain in found[0]
    }


def compute_qualities(record: Record, bare: Record | None, metrics: Sequence[Metric] = (ACCURACY,)) -> dict[str, float]:
    """Return, by column name, metrics of every domain, their averages, and what the other domains gained."""
    found: dict[str, float] = {}
    for metric in metrics:
        scores, before = read_metric(record, metric), None if bare is None else read_metric(bare, metric)
        found |= combine_scores(scores, record, before, metric)
    return found


def resample_qualities(
    record: Record, bare: Record | None, metrics: Sequence[Metric] = (ACCURACY,)
) -> dict[str, NDArray[np.float64]]:
    """Return the same in every resample of the documents."""
    found: dict[str, NDArray[np.float64]] = {}
    for metric in metrics:
        scores = resample(record.outcome.scores, metric)
        before = None if bare is None else resample(bare.outcome.scores, metric)
        found |= combine_scores(scores, record, before, metric)
    return found


def count_effective_documents(record: Record) -> dict[str, float]:
    """Return the effective documents that each part rests on: of its domains, those of the one with the fewest."""
    scores, targets = record.outcome.scores, record.request.targets
    counts = {name: effective_size(score.document_tokens) for name, score in scores.items()}
    others = [count for name, count in counts.items() if name not in targets]
    fewest = {AVERAGE: min(counts.values()), TARGET: min(counts[name] for name in targets)}
    return counts | fewest | ({RETENTION: min(others)} if others else {})


def read_metric(record: Record, metric: Metric) -> dict[str, float]:
    """Return a record's metric by domain, without the domains that have none."""
    found = {name: score.find(metric) for name, score in record.outcome.scores.items()}
    return {name: value for name, value in found.items() if value is not None}


def combine_scores(
    scores: Mapping[str, Number], record: Record, before: Mapping[str, Number] | None, metric: Metric
) -> dict[str, Number]:
    """Return, by column name, a metric of every domain; where all domains have it, also of its averages and retention.

    Args:
        scores: The metric as recorded, by domain.
        record: The record that the metric is of.
        before: The metric of the untouched backbone.
        metric: The metric.
    """
    values = {name: metric.scale * score for name, score in scores.items()}
    found = dict(values)
    if len(values) == len(record.outcome.scores):
        targets = record.request.targets
        found[AVERAGE] = average(list(values.values()))
        found[TARGET] = average([values[name] for name in targets])
        others = [name for name in values if name not in targets]
        if others and before is not None and all(name in before for name in others):
            found[RETENTION] = average([values[name] - metric.scale * before[name] for name in others])
    return {Column(part, metric).name: value for part, value in found.items()}
