"""Target accuracy, retention and cost of a table's rows, and their Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mode.tables.compile import RowResult, TableData
from mode.tables.statistics import Cell

MEASURES = {"flops": "10¹² training operations", "tokens": "million training tokens"}
"""Unit of a row's cost, by the name of the cost."""


@dataclass(frozen=True)
class Place:
    """Target accuracy, retention and cost of a row.

    Attributes:
        index: Index of the row in its table.
        line: Result of the row.
        retention: Change on the domains that are not targets, in points.
        target: Accuracy on the targets, in per cent.
        cost: Training cost over all stages, in the unit of the `Tradeoff`.
        best: Whether no other row dominates this row in the means of target accuracy, retention and cost.
    """

    index: int
    line: RowResult
    retention: Cell
    target: Cell
    cost: float
    best: bool

    @property
    def means(self) -> tuple[float, float, float]:
        """Mean retention, mean target accuracy and negated cost: larger is better."""
        return self.retention.mean, self.target.mean, -self.cost


@dataclass(frozen=True)
class Tradeoff:
    """The rows of a table with a target accuracy and a retention.

    Attributes:
        places: Place of each row.
        measure: Cost for the comparison: `flops` or `seconds`.
        rivals: Whether all rows have the same targets. Only then are the rows compared.
    """

    places: tuple[Place, ...]
    measure: str
    rivals: bool

    @property
    def front(self) -> list[tuple[float, float]]:
        """The Pareto front of retention and target accuracy, by rising retention; empty unless rows are `rivals`."""
        if not self.rivals:
            return []
        points = [place.means[:2] for place in self.places]
        return sorted({point for point in points if not any(dominates(other, point) for other in points)})

    def size(self, place: Place) -> float:
        """Return the relative size of a row's marker: the square root of the row's cost over the largest cost."""
        largest = max((other.cost for other in self.places), default=0.0)
        return math.sqrt(place.cost / largest) if largest else 0.0

    @property
    def legend(self) -> str:
        """Legend of the markers and lines, as text."""
        size = f"Size: {MEASURES[self.measure]}."
        if not self.rivals:
            return f"{size} Rows are adapted to different domains, so none is said to beat another."
        return (
            f"{size} Bold: no other row is as good in accuracy, retention and cost and "
            "better in one, by the means. Dashed: the best of accuracy and retention at any cost."
        )


def compute_tradeoff(compiled: TableData) -> Tradeoff:
    """Return the places of all rows with a target accuracy and a retention.

    The cost is in operations if all rows have them, else in tokens. Seconds would depend on the machine.
    """
    placed = [
        (index, line, kept, target)
        for index, line in enumerate(compiled.lines)
        if (kept := line.cell("retention")) is not None and (target := line.cell("target")) is not None
    ]
    measure = "flops" if placed and all("flops" in line.cost for _, line, _, _ in placed) else "tokens"
    points = [(kept.mean, target.mean, -line.cost[measure]) for _, line, kept, target in placed]
    rivals = bool(compiled.targets)
    places = tuple(
        Place(
            index,
            line,
            kept,
            target,
            line.cost[measure],
            not (rivals and any(dominates(other, point) for other in points)),
        )
        for (index, line, kept, target), point in zip(placed, points, strict=True)
    )
    return Tradeoff(places, measure, rivals)


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether one point is at least as good as another in all values, and better in at least one.

    >>> dominates((1.0, 2.0), (1.0, 1.0)), dominates((1.0, 2.0), (1.0, 2.0)), dominates((1.0, 2.0), (2.0, 1.0))
    (True, False, False)
    """
    return all(a >= b for a, b in zip(one, other, strict=True)) and any(a > b for a, b in zip(one, other, strict=True))


def collect_sides(compiled: TableData) -> tuple[str, str]:
    """Return the names of the retention domains and of the targets; both empty if rows have different targets."""
    named = [name.capitalize() for name in compiled.targets]
    others = [name.capitalize() for name in compiled.domains if name not in compiled.targets]
    return (" and ".join(others), " and ".join(named)) if named else ("", "")
