"""Ratios of times that were measured in the same rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MACHINE = "machine"
"""Job of the cases that measure the limits of the machine."""


@dataclass(frozen=True)
class Ratio:
    """Paired ratios of two variants.

    Attributes:
        median: Median.
        low: First quartile.
        high: Third quartile.
    """

    median: float
    low: float
    high: float


def compute_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the paired ratios of two series of times from the same rounds.

    >>> compute_ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    Ratio(median=2.0, low=2.0, high=2.5)
    """
    paired = [first / second for first, second in zip(ours, theirs, strict=True)]
    if len(paired) == 1:
        return Ratio(paired[0], paired[0], paired[0])
    low, median, high = statistics.quantiles(paired, n=4, method="inclusive")
    return Ratio(median, low, high)
