"""Where the rows of a table stand in target accuracy, retention and cost, and which of them no other row beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mode.tables.compile import Cell, RowResult, TableData

MEASURES = {"flops": "10¹² training operations", "seconds": "seconds of training"}
"""What a row's cost is counted in, by the name of the cost."""


@dataclass(frozen=True)
class Place:
    """Where a row stands.

    Attributes:
        index: Number of the row in its table.
        line: The row.
        retention: Points gained or lost on the other domains.
        target: Accuracy on the domains adapted to, in per cent.
        cost: Training of all its stages, in the unit of its `Tradeoff`.
        best: Whether no rival is as good in all three and better in one, by the means.
    """

    index: int
    line: RowResult
    retention: Cell
    target: Cell
    cost: float
    best: bool

    @property
    def means(self) -> tuple[float, float, float]:
        """Retention, target accuracy and cost, each so that more is better."""
        return self.retention.mean, self.target.mean, -self.cost


@dataclass(frozen=True)
class Tradeoff:
    """The rows of a table that have both accuracies.

    Attributes:
        places: Where each stands.
        measure: The cost that they are compared by: `flops` or `seconds`.
        rivals: Whether they are adapted to the same domains, so that one can beat another.
    """

    places: tuple[Place, ...]
    measure: str
    rivals: bool

    @property
    def front(self) -> list[tuple[float, float]]:
        """The Pareto front of retention and target accuracy at any cost, by rising retention; empty without rivals."""
        if not self.rivals:
            return []
        points = [place.means[:2] for place in self.places]
        return sorted({point for point in points if not any(dominates(other, point) for other in points)})

    def size(self, place: Place) -> float:
        """Return the square root of a row's share of the largest cost: what its marker grows by."""
        largest = max((other.cost for other in self.places), default=0.0)
        return math.sqrt(place.cost / largest) if largest else 0.0

    @property
    def legend(self) -> str:
        """What the marks mean, in words."""
        size = f"Size: {MEASURES[self.measure]}."
        if not self.rivals:
            return f"{size} Rows are adapted to different domains, so none is said to beat another."
        return (
            f"{size} Bold: no other row is as good in accuracy, retention and cost and "
            "better in one, by the means. Dashed: the best of accuracy and retention at any cost."
        )


def compute_tradeoff(compiled: TableData) -> Tradeoff:
    """Place every row that has a target accuracy and a retention.

    Cost is counted in operations if every row says its own, since seconds depend on the machine; else in seconds.
    """
    placed = [
        (index, line, kept, target)
        for index, line in enumerate(compiled.lines)
        if (kept := line.cell("retention")) is not None and (target := line.cell("target")) is not None
    ]
    measure = "flops" if placed and all("flops" in line.cost for _, line, _, _ in placed) else "seconds"
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
    """Say whether something is at least as good as another in everything, and better in something.

    >>> dominates((1.0, 2.0), (1.0, 1.0)), dominates((1.0, 2.0), (1.0, 2.0)), dominates((1.0, 2.0), (2.0, 1.0))
    (True, False, False)
    """
    return all(a >= b for a, b in zip(one, other, strict=True)) and any(a > b for a, b in zip(one, other, strict=True))


def collect_sides(compiled: TableData) -> tuple[str, str]:
    """Name the domains of retention and those adapted to; both empty where they differ from row to row."""
    named = [name.capitalize() for name in compiled.targets]
    others = [name.capitalize() for name in compiled.domains if name not in compiled.targets]
    return (" and ".join(others), " and ".join(named)) if named else ("", "")
