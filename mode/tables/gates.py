"""Gate weights of a row: means over its records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

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


def weigh_own_branches(gates: Mapping[str, Sequence[Sequence[float]]], branches: Sequence[str]) -> float | None:
    """Return the mean weight, in per cent, of the branches that are named like a domain on the text of that domain.

    Args:
        gates: Mean weights, (blocks, branches), by domain.
        branches: Names of the branches.

    Returns:
        The mean over domains and blocks; None if no branch is named like a domain.

    >>> weigh_own_branches({"code": [[0.25, 0.75]], "english": [[1.0, 0.0]]}, ["backbone", "code"])
    75.0
    """
    found = [
        statistics.fmean(block[branches.index(domain)] for block in blocks)
        for domain, blocks in gates.items()
        if domain in branches
    ]
    return 100.0 * statistics.fmean(found) if found else None
