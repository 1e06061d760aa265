"""What each method reaches over its settings: the best target accuracy at every tolerated loss of retention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from mode.tables.columns import RETENTION, TARGET
from mode.tables.compile import BACKBONE, RowResult, TableData

LOSSES = (0.5, 1.0, 2.0)
"""Losses of retention, in points, at which the best target accuracy is shown."""


MOST = 10.0
"""Largest tolerated loss of the mean gain, in points."""


FEWEST_RANKED = 8
"""Smallest number of rows whose ranks are correlated."""


@dataclass(frozen=True)
class Frontier:
    """The settings of one method, and what is reached with them. No training is a setting too.

    Attributes:
        method: Name of the method: what the names of its rows have before `@`.
        label: Label of the method: what the labels of its rows have in common.
        settings: Number of settings in the table.
        rows: The settings with a record.
        bare: Target accuracy of the untouched backbone, in per cent.
    """

    method: str
    label: str
    settings: int
    rows: tuple[RowResult, ...]
    bare: float

    def find_best(self, loss: float) -> RowResult | None:
        """Return the setting with the best target accuracy of those that lose at most `loss` points of retention.

        None if every setting loses more, or has a lower target accuracy than the untouched backbone.
        """
        kept = [row for row in self.rows if -get_mean(row, RETENTION) <= loss and get_mean(row, TARGET) > self.bare]
        return max(kept, key=lambda row: get_mean(row, TARGET), default=None)

    @property
    def steps(self) -> list[tuple[float, float]]:
        """The best target accuracy from a loss on, by rising loss from 0 to `MOST`, where it rises and at `MOST`."""
        losses = sorted({0.0, *(loss for row in self.rows if 0.0 < (loss := -get_mean(row, RETENTION)) < MOST)})
        found: list[tuple[float, float]] = []
        for loss in losses:
            best = self.find_best(loss)
            target = get_mean(best, TARGET) if best else self.bare
            if not found or target > found[-1][1]:
                found.append((loss, target))
        return [*found, (MOST, found[-1][1])]

    @property
    def mean_gain(self) -> float:
        """The gain of target accuracy over the backbone, in points, as a mean over tolerated losses from 0 to `MOST`.

        This is the hypervolume of the settings over `MOST`, with the reference point at the backbone's target accuracy
        and a loss of `MOST` points. It counts settings that were run, and interpolates none.
        """
        return sum((end - start) * (target - self.bare) for (start, target), (end, _) in pairwise(self.steps)) / MOST


def get_mean(row: RowResult, column: str) -> float:
    """Return a row's mean over seeds in a column that it has."""
    cell = row.cell(column)
    assert cell is not None
    return cell.mean


def list_frontiers(compiled: TableData) -> list[Frontier]:
    """Return the frontier of every method with rows `method@setting`; empty without a backbone or common targets."""
    bare = next((line.cell(TARGET) for line in compiled.lines if line.name == BACKBONE), None)
    if bare is None or not compiled.targets:
        return []
    groups: dict[str, list[RowResult]] = {}
    for line in compiled.lines:
        method, at, _ = line.name.partition("@")
        if at:
            groups.setdefault(method, []).append(line)
    return [
        Frontier(
            method,
            find_common([line.label for line in lines]),
            len(lines),
            tuple(line for line in lines if line.cell(TARGET) is not None and line.cell(RETENTION) is not None),
            bare.mean,
        )
        for method, lines in groups.items()
    ]


def find_common(labels: Sequence[str]) -> str:
    """Return the words that labels begin with alike, up to a comma.

    >>> find_common(["SFT, anchored, lr 1.0e-3", "SFT, anchored, lr 1.0e-2"]), find_common(["LoRA, rank 4"])
    ('SFT, anchored', 'LoRA')
    """
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*labels, strict=False))
    common = "".join(letters[0] for letters in alike)
    return common.rpartition(",")[0] or common


def find_leader(frontiers: Sequence[Frontier], loss: float) -> Frontier | None:
    """Return the method that is ahead of every other beyond noise at a loss; None if there is none."""
    found = [(frontier, best) for frontier in frontiers if (best := frontier.find_best(loss)) is not None]
    for frontier, best in found:
        gaps = [best.minus(other, TARGET) for _, other in found if other is not best]
        if gaps and all(gap is not None and gap.holds and gap.cell.mean > 0.0 for gap in gaps):
            return frontier
    return None


def correlate_divergence(compiled: TableData, *, gated: bool = True) -> tuple[float, int] | None:
    """Return Spearman's rank correlation of divergence from the backbone and retention, and the number of rows.

    None without common targets, and with fewer than `FEWEST_RANKED` rows that have both.

    Args:
        compiled: The table.
        gated: Whether rows whose model weighs experts or models token by token count too.
    """
    from scipy.stats import spearmanr

    lines = [line for line in compiled.lines if line.name != BACKBONE and (gated or not line.gates)]
    pairs = [
        (line.cost["divergence"], kept.mean)
        for line in lines
        if "divergence" in line.cost and (kept := line.cell(RETENTION)) is not None
    ]
    if len(pairs) < FEWEST_RANKED or not compiled.targets:
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)
