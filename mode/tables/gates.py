"""Gate weights of a row: means over its records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mode.records.record import Record


def read_routing(records: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Return the mean number of branches per token and the evenness of their weights, by domain; empty if unknown.

    Evenness is the entropy of the weights over that of equal weights, from 0 to 1.
    """
    found = [record.outcome.gates for record in records]
    if not records or not all(each.active is not None for gates in found for each in gates.values()):
        return {}
    return {
        domain: (
            statistics.fmean(active for gates in found for active in gates[domain].active or ()),
            statistics.fmean(
                entropy / math.log(len(mean)) if len(mean) > 1 else 1.0
                for gates in found
                for mean, entropy in zip(gates[domain].mean, gates[domain].entropy or (), strict=True)
            ),
        )
        for domain in found[0]
    }


def average_gates(records: Sequence[Record]) -> dict[str, list[list[float]]]:
    """Return the mean gate weights of every block over records, by domain; empty if a record has no gates."""
    found = [record.outcome.gates for record in records]
    if not records or not all(found):
        return {}
    return {
        domain: [
            [statistics.fmean(seeds) for seeds in zip(*branches, strict=True)]
            for branches in zip(*(gates[domain].mean for gates in found), strict=True)
        ]
        for domain in found[0]
    }
