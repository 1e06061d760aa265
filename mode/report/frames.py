"""A table's numbers as frames of text cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import pandas as pd

from mode.data.contamination import PRETRAINING
from mode.tables.columns import RETENTION, Column
from mode.tables.compile import BACKBONE, RowResult, TableData

COST_COLUMNS = {
    "total": "Total M",
    "trainable": "Trained M",
    "steps": "Steps",
    "tokens": "Tokens M",
    "seconds": "Seconds",
    "n": "n",
}


COSTS = {
    "added": "Added M",
    "active": "Active M",
    "flops": "TFLOPs",
    "rate": "Tokens/s",
    "memory": "Peak GB",
    "domain": "Domain MB",
}
"""What else a row costs, in a table of its own."""


FORMATS = {
    **dict.fromkeys(("total", "trainable", "added", "active"), ".3f"),
    **{"steps": ",.0f", "tokens": ",.2f", "seconds": ",.0f", "n": ".0f"},
    **{"flops": ",.2f", "rate": ",.0f", "memory": ".2f", "domain": ",.2f"},
}


COST_NOTE = (
    "Added: parameters beside the backbone's; active: those that a token's prediction can depend on. TFLOPs: "
    "operations of training over all stages, counted on one row of the model, times its tokens. Peak: of the process, "
    "with scoring. Domain: weights on disk of a stage on one domain, or else of all that the row trained. A dash: "
    "nothing was trained, or the record does not say."
)


CONTAMINATION_NOTE = (
    "Contamination: per cent of the 13-token n-grams of what is scored that also occur in each domain's training "
    "split, and in what the backbone is known to have been pretrained on."
)


def make_frame(compiled: TableData, *, strong: str = "{}") -> pd.DataFrame:
    """Return the table as people read it; what is beyond noise is set in `strong`: winners, and differences."""
    rows = []
    winners = {
        column: None if compiled.table.relative else find_winner(compiled, column) for column in compiled.columns
    }
    for line in compiled.lines:
        row: dict[str, str] = {"Method": line.label}
        for column in compiled.columns:
            text, stands_out = format_cell(compiled, line, column)
            row[column.heading] = strong.format(text) if stands_out or winners[column] == line.name else text
        rows.append(row | format_costs(line, COST_COLUMNS))
    for left, right in compiled.table.differences:
        rows.append(format_difference(compiled, left, right, strong))
    return pd.DataFrame(rows)


def format_cell(compiled: TableData, line: RowResult, column: Column) -> tuple[str, bool]:
    """Render a cell, and say whether it is a difference beyond noise: in a relative table, to the backbone's."""
    value, decimals = line.cell(column.name), column.metric.decimals
    if value is None:
        return "–", False
    if compiled.table.relative and line.name != BACKBONE and column.part != RETENTION:
        gap = line.minus(compiled.line(BACKBONE), column.name)
        return (gap.cell.text(signed=True, decimals=decimals), gap.holds) if gap else ("–", False)
    return value.text(signed=column.part == RETENTION, decimals=decimals), False


def make_cost_frame(compiled: TableData) -> pd.DataFrame:
    """Return what else the rows cost: of what is known of at least one."""
    names = {name: label for name, label in COSTS.items() if any(name in line.cost for line in compiled.lines)}
    return pd.DataFrame([{"Cost": line.label, **format_costs(line, names)} for line in compiled.lines])


def make_contamination_frame(compiled: TableData) -> pd.DataFrame:
    """Return which share of what is scored occurs where in training."""
    rows = []
    for name, shares in compiled.contamination.items():
        row = {f"{compiled.split.capitalize()} split": name.capitalize()}
        for where in [*compiled.domains, PRETRAINING]:
            value = shares.get(where)
            row[where.capitalize()] = "not known" if value is None else f"{100 * value:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def find_winner(compiled: TableData, column: Column) -> str | None:
    """Return the row with the best mean of a quality column, if it is better than every other beyond noise."""
    cells = [(line, line.cell(column.name)) for line in compiled.lines if can_win(line, column)]
    means = [(value.mean, line.name) for line, value in cells if value is not None]
    lines = sorted(means, reverse=column.metric.higher_is_better)
    if len(lines) < 2:
        return None
    best = compiled.line(lines[0][1])
    gaps = [best.minus(compiled.line(name), column.name) for _, name in lines[1:]]
    won = all(gap is not None and gap.holds and column.is_gain(gap.cell.mean) for gap in gaps)
    return best.name if won else None


def can_win(line: RowResult, column: Column) -> bool:
    """Say whether a line can be a column's best: the backbone's retention is zero by definition."""
    return line.name != BACKBONE or column.part != RETENTION


def format_costs(line: RowResult, labels: Mapping[str, str]) -> dict[str, str]:
    """Render costs of a line under their headings."""
    return {
        label: format(line.cost[name], FORMATS[name]) if name in line.cost else "–" for name, label in labels.items()
    }


def format_difference(compiled: TableData, left: str, right: str, strong: str = "{}") -> dict[str, str]:
    """Render the row of paired differences between two lines."""
    one, other = compiled.line(left), compiled.line(right)
    row = {"Method": f"{one.label} − {other.label}"}
    for column in compiled.columns:
        gap = one.minus(other, column.name)
        text = gap.cell.text(signed=True, decimals=column.metric.decimals) if gap else "–"
        row[column.heading] = strong.format(text) if gap and gap.holds else text
    empty = dict.fromkeys(COST_COLUMNS.values(), "")
    both = [seed for seed in one.quality if seed in other.quality]
    return row | {name: value for name, value in empty.items() if name not in row} | {"n": str(len(both))}


def make_interval_frame(compiled: TableData) -> pd.DataFrame:
    """Return the differences' intervals over documents."""
    rows = []
    for left, right in compiled.table.differences:
        one, other = compiled.line(left), compiled.line(right)
        row = {"Difference": f"{one.label} − {other.label}"}
        for column in compiled.columns:
            gap, form = one.minus(other, column.name), f"+.{column.metric.decimals}f"
            ends = None if gap is None else gap.documents
            row[column.heading] = "–" if ends is None else f"{ends.low:{form}} to {ends.high:{form}}"
        rows.append(row)
    return pd.DataFrame(rows)


def make_published_frame(compiled: TableData) -> pd.DataFrame | None:
    """Return the published values, with the averages and differences worked out from them."""
    source = compiled.table.published
    if source is None:
        return None
    labels = {row.name: row.label for row in compiled.table.rows}
    rows: list[dict[str, Any]] = []
    for name, values in source.rows.items():
        rows.append({"Method": labels.get(name, name), **add_average(values)})
    for left, right in compiled.table.differences:
        if left in source.rows and right in source.rows:
            both = [key for key in source.rows[left] if key in source.rows[right]]
            gap = {key: source.rows[left][key] - source.rows[right][key] for key in both}
            rows.append({"Method": f"{labels[left]} − {labels[right]}", **add_average(gap)})
    return pd.DataFrame(rows).map(lambda value: value if isinstance(value, str) else format_or_dash(value))


def format_or_dash(value: float) -> str:
    """Render a published value, or a dash where there is none.

    >>> format_or_dash(76.1), format_or_dash(math.nan)
    ('76.10', '–')
    """
    return "–" if math.isnan(value) else f"{value:.2f}"


def add_average(values: Mapping[str, float]) -> dict[str, float]:
    """Return values under their headings, with their average."""
    named = {name.capitalize(): round(value, 2) for name, value in values.items()}
    if len(named) < 2:
        return named
    return {**named, "Average": round(statistics.fmean(values.values()), 2)}


ROUTING_NOTE = (
    "Routers on the scored text, means over layers and seeds: experts that a token's router gave any weight, and the "
    "entropy of its weights over that of equal ones."
)


def make_routing_frame(compiled: TableData) -> pd.DataFrame | None:
    """Return experts in use and evenness by domain, of every row whose records say so; None without any."""
    rows = []
    for line in compiled.lines:
        if line.routing:
            cells = {
                f"{domain.capitalize()}: {what}": value
                for domain, (active, even) in line.routing.items()
                for what, value in (("in use", f"{active:.2f}"), ("evenness", f"{even:.2f}"))
            }
            rows.append({"Routers": line.label, "Of": str(len(line.branches)), **cells})
    return pd.DataFrame(rows) if rows else None
