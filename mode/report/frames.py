"""The numbers of a table as data frames of text cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import pandas as pd

from mode.data.contamination import PRETRAINING
from mode.tables.columns import RETENTION, TARGET, Column
from mode.tables.compile import BACKBONE, RowResult, TableData
from mode.tables.frontier import LOSSES, MOST, find_leader, get_mean, list_frontiers

COST_COLUMNS = {
    "total": "Total M",
    "trainable": "Trained M",
    "steps": "Steps",
    "tokens": "Tokens M",
    "seconds": "Seconds",
    "n": "n",
}
"""Headings of the costs in the main table, by name."""


COSTS = {
    "added": "Added M",
    "active": "Active M",
    "flops": "TFLOPs",
    "sampling": "Sampling",
    "generation": "MFLOP/token",
    "rate": "Tokens/s",
    "memory": "Peak GB",
    "domain": "Domain MB",
    "tried": "Tried",
    "divergence": "KL",
}
"""Headings of the costs in the separate table of costs, by name."""


FORMATS = {
    **dict.fromkeys(("total", "trainable", "added", "active"), ".3f"),
    **{"steps": ",.0f", "tokens": ",.2f", "seconds": ",.0f", "n": ".0f"},
    **{
        "flops": ",.2f",
        "sampling": ",.2f",
        "generation": ",.1f",
        "rate": ",.0f",
        "memory": ".2f",
        "domain": ",.2f",
        "tried": ".0f",
        "divergence": ".3f",
    },
}
"""Number formats of costs, by name."""


COST_NOTE = (
    "Added: parameters beside the backbone's; active: those that a token's prediction can depend on. TFLOPs: "
    "operations of training over all stages, counted on one row of the model, times its tokens. ≈: by closed form, "
    "for records from before operations were counted. Sampling: TFLOPs of writing an anchor's rows, by closed form; "
    "runs of one backbone share the rows. MFLOP/token: 10⁶ operations of predicting a token at the end of a row, by "
    "closed form, with adapters that are not merged. Peak: of the process, with scoring. Domain: weights on disk of a "
    "stage on one domain, or else of all that the row trained. Tried: settings on the validation split, at this "
    "budget, that the row's were chosen from. KL: divergence of the row's predictions from the backbone's, "
    "KL(backbone ‖ row), in nats per token of the targets' validation text, mean over targets. A dash: nothing was "
    "trained, or the record does not say."
)


CONTAMINATION_NOTE = (
    "Contamination: per cent of the 13-token n-grams of what is scored that also occur in each domain's training "
    "split, and in what the backbone is known to have been pretrained on."
)


def make_frame(compiled: TableData, *, strong: str = "{}") -> pd.DataFrame:
    """Return the main table. Best rows and differences beyond noise are formatted with `strong`."""
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
    """Return a cell as text, and whether the cell is a difference from the backbone beyond noise (relative tables)."""
    value, decimals = line.cell(column.name), column.metric.decimals
    if value is None:
        return "–", False
    if compiled.table.relative and line.name != BACKBONE and column.part != RETENTION:
        gap = line.minus(compiled.line(BACKBONE), column.name)
        return (gap.cell.text(signed=True, decimals=decimals), gap.holds) if gap else ("–", False)
    return value.text(signed=column.part == RETENTION, decimals=decimals), False


def make_cost_frame(compiled: TableData) -> pd.DataFrame:
    """Return the table of costs, with the columns that at least one row has."""
    names = {name: label for name, label in COSTS.items() if any(name in line.cost for line in compiled.lines)}
    return pd.DataFrame([{"Cost": line.label, **format_costs(line, names)} for line in compiled.lines])


def make_contamination_frame(compiled: TableData) -> pd.DataFrame:
    """Return the shares of the scored text that occur in each training text, in per cent."""
    rows = []
    for name, shares in compiled.contamination.items():
        row = {f"{compiled.split.capitalize()} split": name.capitalize()}
        for where in [*compiled.domains, PRETRAINING]:
            value = shares.get(where)
            row[where.capitalize()] = "not known" if value is None else f"{100 * value:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def find_winner(compiled: TableData, column: Column) -> str | None:
    """Return the name of the row with the best mean, if it is better than all other rows beyond noise; else None."""
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
    """Return whether a row can be the best of a column. The backbone's retention is zero by definition."""
    return line.name != BACKBONE or column.part != RETENTION


def format_costs(line: RowResult, labels: Mapping[str, str]) -> dict[str, str]:
    """Return the costs of a row as text, by heading. A missing cost is a dash."""
    return {label: format_cost(line, name) for name, label in labels.items()}


def format_cost(line: RowResult, name: str) -> str:
    """Return one cost of a row as text, with a sign before an estimate."""
    if name not in line.cost:
        return "–"
    return f"{'≈' if name in line.estimated and line.cost[name] else ''}{line.cost[name]:{FORMATS[name]}}"


def format_difference(compiled: TableData, left: str, right: str, strong: str = "{}") -> dict[str, str]:
    """Return the row of paired differences between two rows."""
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
    """Return the intervals over documents of all differences."""
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
    """Return the published values with computed averages and differences; None if the table has no published values."""
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
    """Return a published value as text; a dash for NaN.

    >>> format_or_dash(76.1), format_or_dash(math.nan)
    ('76.10', '–')
    """
    return "–" if math.isnan(value) else f"{value:.2f}"


def add_average(values: Mapping[str, float]) -> dict[str, float]:
    """Return values by heading, with their average if there are several."""
    named = {name.capitalize(): round(value, 2) for name, value in values.items()}
    if len(named) < 2:
        return named
    return {**named, "Average": round(statistics.fmean(values.values()), 2)}


FRONTIER_NOTE = (
    "Frontiers: the best mean accuracy on the targets of a method's settings that lose at most so many points of "
    f"retention (a dash: none of them gains), and the gain over the untouched backbone as a mean over tolerated losses "
    f"from 0 to {MOST:.0f} points. Settings: those with a record, of those in the table. Bold: ahead of every other "
    "method beyond noise."
)


ROUTING_NOTE = (
    "Routers on the scored text, means over layers and seeds: experts that a token's router gave any weight, and the "
    "entropy of its weights over that of equal ones."
)


def make_frontier_frame(compiled: TableData, *, strong: str = "{}") -> pd.DataFrame | None:
    """Return the table of frontiers; None if the table does not ask for them."""
    frontiers = list_frontiers(compiled) if compiled.table.frontiers else []
    leaders = {loss: find_leader(frontiers, loss) for loss in LOSSES}
    rows = []
    for frontier in frontiers:
        row = {"Frontier": frontier.label, "Settings": f"{len(frontier.rows)} of {frontier.settings}"}
        for loss in LOSSES:
            best = frontier.find_best(loss)
            text = "–" if best is None else f"{get_mean(best, TARGET):.2f}"
            row[f"Targets at −{loss:g}"] = strong.format(text) if leaders[loss] is frontier else text
        rows.append(row | {f"Mean gain to −{MOST:.0f}": f"{frontier.mean_gain:.2f}" if frontier.rows else "–"})
    return pd.DataFrame(rows) if rows else None


def make_routing_frame(compiled: TableData) -> pd.DataFrame | None:
    """Return the experts in use and the evenness of their weights, by row and domain; None without such records."""
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
