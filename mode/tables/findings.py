"""Sentences about a table, made from its numbers: whether a published claim holds, and where curves cross."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, pairwise

from mode.tables.columns import Column, parse_column
from mode.tables.compile import Difference, RowResult, TableData
from mode.tables.table import Claim, Curves


def list_findings(compiled: TableData) -> list[str]:
    """Return what the rows say of the claims and curves of their table; nothing about rows without records."""
    sentences = [check_claim(compiled, claim) for claim in compiled.table.claims]
    sentences += [
        has_crossed(compiled, panel, *pair) for panel in compiled.table.curves for pair in combinations(panel.lines, 2)
    ]
    return [sentence for sentence in sentences if sentence]


def check_claim(compiled: TableData, claim: Claim) -> str:
    """Say whether a published claim holds, by the difference between two rows."""
    ours, theirs = compiled.line(claim.ours), compiled.line(claim.theirs)
    gap = ours.minus(theirs, claim.column)
    if gap is None:
        return ""
    column = parse_column(claim.column)
    where, said = column.heading, f"{phrase_difference(gap, column)}: {judge(gap, column)}"
    return f"Published: {claim.text} Here: {ours.label} − {theirs.label} on {where} {said}."


def phrase_difference(gap: Difference, column: Column) -> str:
    """Phrase a difference with its interval over documents, where there is one."""
    form, ends = f"+.{column.metric.decimals}f", gap.documents
    interval = "" if ends is None else f"{ends.low:{form}} to {ends.high:{form}}, "
    return f"{gap.cell.mean:{form}} ({interval}n {gap.cell.n})"


def judge(gap: Difference, column: Column) -> str:
    """Say what a difference that should be for the better comes to."""
    if not gap.holds:
        return "not told from noise"
    return "it holds here" if column.is_gain(gap.cell.mean) else "the opposite holds here"


def find_place(line: RowResult, panel: Curves) -> float | None:
    """Return where a row is on a panel's axis; None without a record, or where the axis is not for it."""
    return line.cost.get(panel.x)


def collect_points(compiled: TableData, panel: Curves, label: str) -> dict[float, RowResult]:
    """Return a line's rows by their place on the axis, in order."""
    rows = [compiled.line(name) for name in panel.lines[label]]
    placed = {
        x: row for row in rows if (x := find_place(row, panel)) is not None and row.cell(panel.column) is not None
    }
    return dict(sorted(placed.items()))


def has_crossed(compiled: TableData, panel: Curves, first: str, second: str) -> str:
    """Say, where two lines have points at the same places, who is ahead at which, and where they cross."""
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
    """Return where a difference changes its sign, between neighbouring points on a logarithmic axis.

    >>> [round(x, 2) for x in find_crossings([(10, -1.0), (100, 1.0), (1000, 3.0)])]
    [31.62]
    """
    found = []
    for (x, before), (y, after) in pairwise(gaps):
        if before * after < 0.0:
            share = before / (before - after)
            found.append(math.exp(math.log(x) + share * (math.log(y) - math.log(x))))
    return found
