"""Which rows of a table were timed under the same conditions, so that their seconds may be compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mode.records.record import Record
from mode.tables.select import add_needed


def list_timings(records: Sequence[Record], by_id: Mapping[str, Record]) -> set[str]:
    """Return the different conditions under which the trained stages of a row were timed: machine, threads and code."""
    stages = [stage for record in records for stage in add_needed(record, by_id) if stage.outcome.seconds]
    return {describe_timing(stage.provenance) for stage in stages}


def describe_timing(provenance: Mapping[str, Any]) -> str:
    """Return the conditions that the time of a run depends on: the machine, the threads, and the code's commit."""
    names = ("machine", "threads", "commit", "dirty", "versions")
    return json.dumps({name: provenance.get(name) for name in names}, sort_keys=True)


def find_untimed(timings: Mapping[str, set[str]]) -> tuple[str, ...]:
    """Return the names of the rows that were not timed under the conditions of most rows.

    Args:
        timings: Different conditions of a row's records, by name of the row; none for a row that trains nothing.

    >>> find_untimed({"sft": {"a"}, "lora": {"b"}, "mode": {"a"}, "btm": {"a", "b"}, "backbone": set()})
    ('lora', 'btm')
    """
    alone = Counter(condition for found in timings.values() if len(found) == 1 for condition in found)
    usual = {condition for condition, _ in alone.most_common(1)}
    return tuple(name for name, found in timings.items() if found and found != usual)
