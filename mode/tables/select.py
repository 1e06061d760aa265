"""Select the records of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mode.config import identity
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.records.record import Record


def select(runs: Mapping[str, Run], records: Sequence[Record]) -> tuple[dict[str, list[Record]], int]:
    """Return the records of every row, one per seed, all under the same conditions.

    Scores under different conditions (other data, backbone or precision) are not comparable. The conditions with the
    most matching records are chosen.

    Args:
        runs: Run of every row with any seed, by row name.
        records: All records.

    Returns:
        Records by row, in order of seed, and the number of matching records left out.

    Raises:
        ConfigError: A row has two records of one seed.
    """
    matching: dict[str, list[Record]] = {}
    for name, run in runs.items():
        wanted = remove_seed(identity.describe_run(run) | {"backbone": {"name": run.backbone.name}})
        matching[name] = [record for record in records if remove_seed(record.asked) == wanted]
    conditions = [record.conditions for found in matching.values() for record in found]
    chosen = max(sorted(set(conditions)), key=conditions.count) if conditions else ""
    kept = {
        name: sorted((record for record in found if record.conditions == chosen), key=lambda record: record.seed)
        for name, found in matching.items()
    }
    for name, found in kept.items():
        for first, second in pairwise(found):
            if first.seed == second.seed:
                files = f"{first.filename} and {second.filename}"
                raise ConfigError(f"{files}: two records of row {name} with seed {first.seed}: remove the wrong one")
    return kept, len(conditions) - sum(len(found) for found in kept.values())


def remove_seed(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a record without the seed."""
    return {name: value for name, value in asked.items() if name != "seed"}


def add_needed(record: Record, records: Mapping[str, Record]) -> list[Record]:
    """Return a record and the records of its earlier stages, each once.

    Args:
        record: The record.
        records: All records, by id.

    Raises:
        ConfigError: The record of an earlier stage is missing.
    """
    result = {record.id: record}
    for run_id in record.origin.needs:
        if run_id not in records:
            raise ConfigError(f"record {record.id} needs run {run_id}, which has no record in the same folder")
        result |= {stage.id: stage for stage in add_needed(records[run_id], records)}
    return list(result.values())
