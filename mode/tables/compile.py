"""Compile a table from records: one result per row, with quality per seed and the cost over all stages."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mode.config.compose import parse_overrides
from mode.config.run import Run
from mode.records.contents import Outcome
from mode.records.metrics import ACCURACY, Metric, find_metrics
from mode.records.record import Record
from mode.tables.columns import AVERAGE, RETENTION, TARGET, Column, parse_column
from mode.tables.gates import average_gates, read_routing, weigh_own_branches
from mode.tables.select import add_needed, select
from mode.tables.statistics import (
    Cell,
    Interval,
    count_effective,
    interval_over_documents,
    interval_over_seeds,
    resample,
    summarise_seeds,
)
from mode.tables.table import Table, compose_rows, select_rows
from mode.tables.timing import find_untimed, list_timings

BACKBONE = "backbone"
"""Name of the row of the untouched backbone."""


Number = TypeVar("Number", float, NDArray[np.float64])
"""A quality, or its values in all resamples, (RESAMPLES,)."""


def average(values: Sequence[Number]) -> Number:
    """Return the mean of numbers, or the element-wise mean of arrays."""
    total: Number = sum(values[1:], start=values[0]) / len(values)
    return total


@dataclass(frozen=True)
class Difference:
    """A paired difference between two rows.

    Attributes:
        cell: Mean and deviation over seeds.
        documents: Interval over documents of the mean over seeds; None if the records have no sums over documents, or
            with too few documents.
        seeds: Interval over seeds; None with a single seed.
    """

    cell: Cell
    documents: Interval | None
    seeds: Interval | None

    @property
    def holds(self) -> bool:
        """Whether the difference is beyond noise: no interval, over documents or seeds, includes zero."""
        return (
            self.documents is not None
            and self.documents.excludes_zero
            and (self.seeds is None or self.seeds.excludes_zero)
        )

    @property
    def p(self) -> float | None:
        """The larger p-value of the two intervals; None without an interval over documents."""
        return None if self.documents is None else max(self.documents.p, self.seeds.p if self.seeds else 0.0)


def differs_from_forecast(outcome: Outcome) -> bool:
    """Return whether the tokens or the operations of a run differ from its forecast by more than one per cent."""
    expected = outcome.forecast
    if expected is None or outcome.flops is None:
        return False
    pairs = ((outcome.tokens, expected.tokens), (outcome.flops, expected.flops))
    return any(abs(found - forecast) > 0.01 * forecast for found, forecast in pairs)


@dataclass(frozen=True)
class RowResult:
    """One row of a table, computed from its records.

    Attributes:
        name: Name of the row.
        label: Label of the row.
        quality: Quality by seed and column name, in the unit shown: every metric of every domain, of the average, of
            the targets, and as retention.
        resampled: Quality in all resamples of the documents, (RESAMPLES,), by seed and column name, where the records
            have sums over documents.
        documents: Number of effective documents by domain, `average`, `target` and `retention`. A value over several
            domains has that of the domain with the fewest.
        cost: Cost by name: parameters in millions, number of targets, `train.batch.examples`, share and weight of an
            anchor, weight of the branches named like a domain; over all stages steps, tokens in millions, 1e12
            operations, seconds, and tokens per second; peak memory in GB; MB on disk that one domain adds; divergence
            from the backbone; n.
        gates: Mean gate weights of every block over seeds, by domain, the backbone's first; empty without gates.
        routing: Mean number of branches in use and evenness of their weights, by domain (see `read_routing`).
        branches: Names of the branches.
        astray: Whether the tokens or the operations of a stage differ from its forecast.
        runs: Id of the run, by seed.
        estimated: Names of costs that are estimated, because the records do not hold them.
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
    estimated: frozenset[str] = frozenset()

    def cell(self, column: str) -> Cell | None:
        """Return the mean and deviation of a column over seeds; None without values."""
        return summarise_seeds([values[column] for values in self.quality.values() if column in values])

    def minus(self, other: RowResult, column: str) -> Difference | None:
        """Return the paired difference from another row over the seeds of both rows; None without a common seed."""
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
    """Return the contamination from a record with the conditions and the split of `first`; empty if none holds it."""
    for record in records:
        found = record.outcome.contamination
        if found and record.conditions == first.conditions and record.outcome.split == first.outcome.split:
            return {name: dict(found[name]) for name in first.outcome.scores}
    return {}


@dataclass(frozen=True)
class TableData:
    """A table compiled from records.

    Attributes:
        table: Settings of the table.
        lines: Results of the rows, in order.
        domains: Scored domains, in order.
        targets: Targets of all rows; empty if rows have different targets.
        split: Scored split.
        left_out: Number of matching records under other conditions.
        overlap: Domains whose splits may overlap with the backbone's pretraining text.
        contamination: Share of the n-grams of a scored domain that occur in a training text, by domain and text; empty
            if no record holds it.
        settings: Run of every row, with any seed.
        untimed: Names of the rows without seconds, because they were timed under other conditions than most rows.
    """

    table: Table
    lines: tuple[RowResult, ...]
    domains: tuple[str, ...]
    targets: tuple[str, ...]
    split: str
    left_out: int
    overlap: tuple[str, ...]
    contamination: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    settings: Mapping[str, Run] = field(default_factory=dict)
    untimed: tuple[str, ...] = ()

    def line(self, name: str) -> RowResult:
        """Return the result of a row by its name."""
        return next(line for line in self.lines if line.name == name)

    @property
    def says_something(self) -> bool:
        """Whether there is a record of a row other than the untouched backbone."""
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
    """Return a table compiled from all records of a results folder.

    Raises:
        ConfigError: A row does not compose, or the record of an earlier stage is missing.
    """
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
    bare = next(iter(chosen.get(BACKBONE, ())), None)
    before = {} if bare is None else {metric: resample(bare.outcome.scores, metric) for metric in table.needed}
    lines = tuple(
        compute_row(row.name, table.marked(row), chosen[row.name], bare, before, by_id, table.needed)
        for row in table.rows
    )
    untimed = find_untimed({name: list_timings(found, by_id) for name, found in chosen.items()})
    return TableData(
        table=table,
        lines=tuple(drop_times(line) if line.name in untimed else line for line in lines),
        domains=domains,
        targets=targets,
        split=first.outcome.split if first else "test",
        left_out=left_out,
        overlap=first.overlap if first else (),
        contamination=find_contamination(first, records) if first else {},
        settings=runs,
        untimed=untimed,
    )


def drop_times(line: RowResult) -> RowResult:
    """Return a row without its seconds and its rate."""
    return replace(line, cost={name: value for name, value in line.cost.items() if name not in ("seconds", "rate")})


def compute_row(
    name: str,
    label: str,
    records: Sequence[Record],
    bare: Record | None,
    before: Mapping[Metric, Mapping[str, NDArray[np.float64]]],
    by_id: Mapping[str, Record],
    metrics: Sequence[Metric],
) -> RowResult:
    """Return the result of one row. The cost includes all earlier stages of the row.

    Args:
        name: Name of the row.
        label: Label of the row.
        records: Records of the row, in order of seed.
        bare: Record of the untouched backbone.
        before: Its metrics in all resamples.
        by_id: All records.
        metrics: Metrics to compute.
    """
    quality = {record.seed: compute_qualities(record, bare, metrics) for record in records}
    gates = average_gates(records)
    costs = [[stage.outcome for stage in add_needed(record, by_id)] for record in records]
    branches = records[0].outcome.branches if records else ()
    own = {} if (weight := weigh_own_branches(gates, branches)) is None else {"own": weight}
    return RowResult(
        name=name,
        label=label,
        quality=quality,
        resampled={record.seed: resample_qualities(record, before, metrics) for record in records},
        documents=count_effective_documents(records[0]) if records else {},
        cost={"n": len(records), **(compute_row_cost(records[0], costs) if records else {}), **own},
        gates=gates,
        routing=read_routing(records),
        branches=branches,
        astray=any(differs_from_forecast(stage) for stages in costs for stage in stages),
        runs={record.seed: record.id for record in records},
    )


def compute_row_cost(record: Record, costs: Sequence[Sequence[Outcome]]) -> dict[str, float]:
    """Return the cost of a row by name. Earlier records do not hold all of it.

    Args:
        record: The record of one seed.
        costs: Outcomes of all stages, by seed. The row's own stage is first.
    """
    outcome, stages = record.outcome, costs[0]
    cost: dict[str, float] = {"total": outcome.parameters.total / 1e6, "added": outcome.parameters.added / 1e6}
    cost["trainable"] = max(stage.parameters.trainable for stage in stages) / 1e6
    if outcome.forecast is not None:
        cost["active"] = outcome.forecast.active / 1e6
    cost["domains"] = len(record.request.targets)
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
    divergences = [statistics.fmean(each[0].divergence.values()) for each in costs if each[0].divergence]
    if divergences:
        cost["divergence"] = statistics.fmean(divergences)
    peaks = [stage.peak_memory_bytes for each in costs for stage in each]
    if None not in peaks:
        cost["memory"] = max(peak for peak in peaks if peak is not None) / 1e9
    kept = stages[-1].kept_bytes  # an earlier stage, if there is one, trains on one domain
    if kept is not None:
        cost["domain"] = kept / 1e6
    return cost


def compute_qualities(record: Record, bare: Record | None, metrics: Sequence[Metric] = (ACCURACY,)) -> dict[str, float]:
    """Return metrics, their averages and, given the backbone's record `bare`, retention, by column name."""
    found: dict[str, float] = {}
    for metric in metrics:
        scores, before = read_metric(record, metric), None if bare is None else read_metric(bare, metric)
        found |= combine_scores(scores, record, before, metric)
    return found


def resample_qualities(
    record: Record, before: Mapping[Metric, Mapping[str, NDArray[np.float64]]], metrics: Sequence[Metric]
) -> dict[str, NDArray[np.float64]]:
    """Return the values of `compute_qualities` in all resamples of the documents, (RESAMPLES,), by column name.

    Args:
        record: The record.
        before: Metrics of the untouched backbone in all resamples; empty without a record of it.
        metrics: Metrics to compute.
    """
    found: dict[str, NDArray[np.float64]] = {}
    for metric in metrics:
        found |= combine_scores(resample(record.outcome.scores, metric), record, before.get(metric), metric)
    return found


def count_effective_documents(record: Record) -> dict[str, float]:
    """Return the effective documents of each part: of several domains, those of the domain with the fewest."""
    scores, targets = record.outcome.scores, record.request.targets
    counts = {name: count_effective(score.document_tokens) for name, score in scores.items()}
    others = [count for name, count in counts.items() if name not in targets]
    fewest = {AVERAGE: min(counts.values()), TARGET: min(counts[name] for name in targets)}
    return counts | fewest | ({RETENTION: min(others)} if others else {})


def read_metric(record: Record, metric: Metric) -> dict[str, float]:
    """Return a metric of a record by domain. Domains without a value are left out."""
    found = {name: score.find(metric) for name, score in record.outcome.scores.items()}
    return {name: value for name, value in found.items() if value is not None}


def combine_scores(
    scores: Mapping[str, Number], record: Record, before: Mapping[str, Number] | None, metric: Metric
) -> dict[str, Number]:
    """Return a metric of all domains by column name and, if all domains have it, its averages and retention.

    Args:
        scores: The metric as recorded, by domain.
        record: The record of the scores.
        before: The metric of the untouched backbone, by domain.
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
