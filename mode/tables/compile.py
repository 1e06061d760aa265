"""Compile a table from records: one line per row, with quality per seed and the cost of every stage."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mode.config.compose import parse_overrides
from mode.config.method import Anchor
from mode.records.record import Record
from mode.tables.select import add_needed, select
from mode.tables.statistics import Interval, effective_size, interval_over_documents, interval_over_seeds, resample
from mode.tables.table import Table, compose_rows, select_rows

QUALITY_DECIMALS = 2


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

    def text(self, *, signed: bool = False) -> str:
        """Render the cell.

        >>> Cell(1.234, 0.1, 3).text(), Cell(1.234, math.nan, 1).text(signed=True)
        ('1.23 ± 0.10', '+1.23')
        """
        mean = f"{self.mean:{'+' if signed else ''}.{QUALITY_DECIMALS}f}"
        return mean if self.n < 2 else f"{mean} ± {self.std:.{QUALITY_DECIMALS}f}"


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
        documents: Its interval over documents, of the mean over seeds.
        seeds: Its interval over seeds; None with a single one.
    """

    cell: Cell
    documents: Interval
    seeds: Interval | None

    @property
    def holds(self) -> bool:
        """Whether neither the choice of documents nor, where there are several, that of seeds explains it."""
        return self.documents.excludes_zero and (self.seeds is None or self.seeds.excludes_zero)


def name_branches(records: Sequence[Record]) -> tuple[str, ...]:
    """Return the names of a row's branches: as its method has them, or numbers."""
    gates = records[0].happened.get("gates") if records else None
    if not gates:
        return ()
    if named := records[0].happened.get("branches"):
        return tuple(named)
    count, asked = len(next(iter(gates.values()))["mean"][0]), records[0].asked
    if "num_blocks" not in asked["method"]:
        return tuple(f"expert {number + 1}" for number in range(count))
    composed = asked["method"].get("start") == "experts"  # records of MoDE that do not name them
    return ("backbone", *(asked["targets"] if composed else [f"expert {number + 1}" for number in range(count - 1)]))


def read_routing(records: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Return, by domain, how many branches tokens had and how even their weights were; empty if unknown."""
    found = [record.happened.get("gates") or {} for record in records]
    if not records or not all("active" in told for gates in found for told in gates.values()):
        return {}
    return {
        domain: (
            statistics.fmean(active for gates in found for active in gates[domain]["active"]),
            statistics.fmean(
                entropy / math.log(len(mean)) if len(mean) > 1 else 1.0
                for gates in found
                for mean, entropy in zip(gates[domain]["mean"], gates[domain]["entropy"], strict=True)
            ),
        )
        for domain in found[0]
    }


def differs_from_forecast(happened: Mapping[str, Any]) -> bool:
    """Say whether what a run trained on, or took, differs from its forecast by more than one per cent.

    >>> differs_from_forecast({"tokens": 100, "flops": 1.03e6, "forecast": {"tokens": 100, "flops": 1e6}})
    True
    >>> differs_from_forecast({"tokens": 100})
    False
    """
    expected = happened.get("forecast")
    if expected is None:
        return False
    return any(abs(happened[key] - expected[key]) > 0.01 * expected[key] for key in ("tokens", "flops"))


@dataclass(frozen=True)
class RowResult:
    """One row of a table, computed from its records.

    Attributes:
        name: Row name.
        label: What people read.
        quality: Per seed: accuracy of every domain, `average` and `retention`, in per cent and points.
        resampled: The same in every resample of the documents.
        documents: Effective documents of every column; what rests on several domains counts as the one with the fewest.
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
        resamples = [self.resampled[seed][column] - other.resampled[seed][column] for seed in both]
        documents = interval_over_documents(summary.mean, resamples, self.documents[column])
        seeds = interval_over_seeds([self.quality[seed][column] - other.quality[seed][column] for seed in both])
        return Difference(summary, documents, seeds)


def find_contamination(first: Record, records: Sequence[Record]) -> dict[str, dict[str, float | None]]:
    """Return what any record under the conditions of a table's says of its split; earlier records did not say it."""
    for record in records:
        found = record.happened.get("contamination")
        if found and record.conditions == first.conditions and record.happened["split"] == first.happened["split"]:
            return {name: dict(found[name]) for name in first.happened["scores"]}
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
    def columns(self) -> list[str]:
        """Quality columns in order."""
        return [*self.domains, "average", "retention"]


def compile_table(table: Table, records: Sequence[Record], overrides: Sequence[str], extra: Path | None) -> TableData:
    """Compile a table from records."""
    runs = compose_rows(table, overrides, extra)
    table = select_rows(table, runs)
    alike = [record for record in records if not table.settles or record.seed in table.seeds]
    chosen, left_out = select(runs, alike)
    by_id = {record.id: record for record in records}
    first = next((record for found in chosen.values() for record in found), None)
    domains = tuple(first.happened["scores"]) if first else ()
    several = {tuple(record.asked["targets"]) for found in chosen.values() for record in found}
    targets = several.pop() if len(several) == 1 else ()
    chosen_by = [item for item in parse_overrides(overrides) if item.key in ("budget", "experiment")]
    under = [f"{item.key}={item.value}" for item in chosen_by if item.value is not None]
    table = replace(table, title=" ".join([table.title, *([f"({', '.join(under)})"] if under else [])]))
    bare = chosen.get(BACKBONE) or []
    lines = tuple(
        compute_row(row.name, table.marked(row), chosen[row.name], bare[0] if bare else None, by_id)
        for row in table.rows
    )
    return TableData(
        table=table,
        lines=lines,
        domains=domains,
        targets=targets,
        split=first.happened["split"] if first else "test",
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
) -> RowResult:
    """Compute one line. Cost counts every stage a row stands on, since whoever starts from nothing pays for all."""
    quality = {record.seed: compute_qualities(record, bare) for record in records}
    costs = [[stage.happened for stage in add_needed(record, by_id)] for record in records]
    return RowResult(
        name=name,
        label=label,
        quality=quality,
        resampled={record.seed: resample_qualities(record, bare) for record in records},
        documents=count_effective_documents(records[0]) if records else {},
        cost={"n": len(records), **(compute_row_cost(records[0], costs) if records else {})},
        gates=average_gates(records),
        routing=read_routing(records),
        branches=name_branches(records),
        astray=any(differs_from_forecast(stage) for stages in costs for stage in stages),
        runs={record.seed: record.id for record in records},
    )


def compute_row_cost(record: Record, costs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Return what a row costs; records of earlier versions do not say all of it.

    Args:
        record: The record of one seed.
        costs: By seed, what happened in every stage; the row's own stage first.
    """
    sizes, stages = record.happened["parameters"], costs[0]
    cost: dict[str, float] = {"total": sizes["total"] / 1e6, "added": sizes["added"] / 1e6}
    cost["trainable"] = max(stage["parameters"]["trainable"] for stage in stages) / 1e6
    if forecast := record.happened.get("forecast"):
        cost["active"] = forecast["active"] / 1e6
    if (examples := record.asked["train"].get("examples")) is not None:
        cost["examples"] = examples
    if anchor := record.asked["method"].get("anchor"):
        cost |= {name: anchor.get(name, getattr(Anchor, name)) for name in ("share", "weight")}
    cost["steps"] = sum(stage["steps"] for stage in stages)
    cost["tokens"] = sum(stage["tokens"] for stage in stages) / 1e6
    if all("flops" in stage for stage in stages):
        cost["flops"] = sum(stage["flops"] for stage in stages) / 1e12
    cost["seconds"] = statistics.fmean(sum(stage["seconds"] for stage in each) for each in costs)
    if cost["seconds"]:
        cost["rate"] = 1e6 * cost["tokens"] / cost["seconds"]
    if all("peak_memory_bytes" in stage for each in costs for stage in each):
        cost["memory"] = max(stage["peak_memory_bytes"] for each in costs for stage in each) / 1e9
    if "kept_bytes" in stages[-1]:  # an earlier stage is one domain's, where there is one
        cost["domain"] = stages[-1]["kept_bytes"] / 1e6
    return cost


def average_gates(records: Sequence[Record]) -> dict[str, list[list[float]]]:
    """Return, by domain, the mean over records of every block's gate weights; empty where a record has none."""
    found = [record.happened.get("gates") for record in records]
    if not records or not all(found):
        return {}
    return {
        domain: [
            [statistics.fmean(seeds) for seeds in zip(*branches, strict=True)]
            for branches in zip(*(gates[domain]["mean"] for gates in found if gates), strict=True)
        ]
        for domain in found[0] or {}
    }


def compute_qualities(record: Record, bare: Record | None) -> dict[str, float]:
    """Return accuracies in per cent, their average, and retention: points gained on the other domains."""
    before = read_accuracies(bare) if bare is not None else None
    return combine_accuracies(read_accuracies(record), record.asked["targets"], before)


def resample_qualities(record: Record, bare: Record | None) -> dict[str, NDArray[np.float64]]:
    """Return the same in every resample of the documents."""
    before = resample(bare.happened["scores"]) if bare is not None else None
    return combine_accuracies(resample(record.happened["scores"]), record.asked["targets"], before)


def count_effective_documents(record: Record) -> dict[str, float]:
    """Return the effective documents that each quality rests on: of its domains, those of the one with the fewest."""
    scores, targets = record.happened["scores"], record.asked["targets"]
    counts = {name: effective_size(score["document_tokens"]) for name, score in scores.items()}
    others = [count for name, count in counts.items() if name not in targets]
    fewest = {"average": min(counts.values()), "target": min(counts[name] for name in targets)}
    return counts | fewest | ({"retention": min(others)} if others else {})


def read_accuracies(record: Record) -> dict[str, float]:
    """Return a record's accuracies by domain."""
    return {name: score["accuracy"] for name, score in record.happened["scores"].items()}


def combine_accuracies(
    scores: Mapping[str, Number], targets: Sequence[str], before: Mapping[str, Number] | None
) -> dict[str, Number]:
    """Return accuracies in per cent, their average, the targets' average, and retention where it can be known.

    >>> combine_accuracies({"code": 0.5, "english": 0.25}, ["code"], {"code": 0.25, "english": 0.5})
    {'code': 50.0, 'english': 25.0, 'average': 37.5, 'target': 50.0, 'retention': -25.0}
    """
    values = {name: 100.0 * score for name, score in scores.items()}
    found = {**values, "average": average(list(values.values())), "target": average([values[name] for name in targets])}
    others = [name for name in scores if name not in targets]
    if before is not None and others:
        found["retention"] = average([values[name] - 100.0 * before[name] for name in others])
    return found
