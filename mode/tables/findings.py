"""Sentences about a table, from its numbers: whether published claims hold, and where curves cross."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, pairwise

from mode.tables.columns import Column, parse_column
from mode.tables.compile import Difference, RowResult, TableData
from mode.tables.statistics import Cell
from mode.tables.table import CURVE_COSTS, Claim, Curves


def list_findings(compiled: TableData) -> list[str]:
    """Return the sentences about a table's claims and curves. Rows without records have no sentence."""
    sentences = [check_claim(compiled, claim) for claim in compiled.table.claims]
    panels = [panel for panel in compiled.table.curves if panel.column not in CURVE_COSTS]
    sentences += [has_crossed(compiled, panel, *pair) for panel in panels for pair in combinations(panel.lines, 2)]
    return [sentence for sentence in sentences if sentence]


def check_claim(compiled: TableData, claim: Claim) -> str:
    """Return a sentence about a published claim, by the difference between two rows; empty without records."""
    ours, theirs = compiled.line(claim.ours), compiled.line(claim.theirs)
    gap = ours.minus(theirs, claim.column)
    if gap is None:
        return ""
    column = parse_column(claim.column)
    where, said = column.heading, f"{phrase_difference(gap, column)}: {judge(gap, column)}"
    return f"Published: {claim.text} Here: {ours.label} − {theirs.label} on {where} {said}."


def phrase_difference(gap: Difference, column: Column) -> str:
    """Return a difference as text, with its interval over documents if there is one."""
    form, ends = f"+.{column.metric.decimals}f", gap.documents
    interval = "" if ends is None else f"{ends.low:{form}} to {ends.high:{form}}, "
    return f"{gap.cell.mean:{form}} ({interval}n {gap.cell.n})"


def judge(gap: Difference, column: Column) -> str:
    """Return the verdict on a difference that a publication claims to be an improvement."""
    if not gap.holds:
        return "not told from noise"
    return "it holds here" if column.is_gain(gap.cell.mean) else "the opposite holds here"


def find_place(line: RowResult, panel: Curves) -> float | None:
    """Return a row's place on the x axis of a panel; None without a record, or if the row has no such cost."""
    return line.cost.get(panel.x)


def find_value(line: RowResult, column: str) -> Cell | None:
    """Return a row's quality, or a cost without deviation, by the name of a curve's column; None without a record."""
    if column not in CURVE_COSTS:
        return line.cell(column)
    return Cell(line.cost[column], 0.0, int(line.cost["n"])) if column in line.cost else None


def collect_points(compiled: TableData, panel: Curves, label: str) -> dict[float, RowResult]:
    """Return the rows of a line by their place on the x axis, in order."""
    rows = [compiled.line(name) for name in panel.lines[label]]
    placed = {
        x: row
        for row in rows
        if (x := find_place(row, panel)) is not None and find_value(row, panel.column) is not None
    }
    return dict(sorted(placed.items()))


def has_crossed(compiled: TableData, panel: Curves, first: str, second: str) -> str:
    """Return a sentence about two lines: which is ahead at each common place, and where they cross.

    The sentence is empty with fewer than two common places.
    """
    ours, theirs = collect_points(compiled, panel, first), collect_points(compiled, panel, second)
    gaps = {x: gap for x in ours if x in theirs and (gap := ours[x].minus(theirs[x], panel.column)) is not None}
    if len(gaps) < 2:
        return ""
    shown = [f"{gap.cell.mean:+.2f} at {x:g}{'' if gap.holds else ' (noise)'}" for x, gap in gaps.items()]
    sure = [(x, gap.cell.mean) for x, gap in gaps.items() if gap.holds]
    where = find_crossings(sure)
    meet = f"they cross at about {' and '.join(f'{x:.3g}' for x in where)}" if where else "no crossing is beyond noise"
    return f"{panel.title}: {first} − {second} on {panel.column.capitalize()}: {', '.join(shown)}; {meet}."


def find_crossings(gaps: Sequence[tuple[float, float]]) -> list[float]:
    """Return where a difference changes its sign, interpolated between neighbouring points on a logarithmic axis.

    >>> [round(x, 2) for x in find_crossings([(10, -1.0), (100, 1.0), (1000, 3.0)])]
    [31.62]
    """
    found = []
    for (x, before), (y, after) in pairwise(gaps):
        if before * after < 0.0:
            share = before / (before - after)
            found.append(math.exp(math.log(x) + share * (math.log(y) - math.log(x))))
    return found
