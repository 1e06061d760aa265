"""A run's record: what was asked, what happened, and under what conditions. Tables and plots follow from records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mode.records.contents import (
    Outcome,
    Provenance,
    Request,
    read_outcome,
    read_provenance,
    read_request,
    upgrade,
)
from mode.records.measurement import Measurement, read_measurement

SCHEMA = 1


@dataclass(frozen=True)
class Record(Measurement):
    """What a finished run leaves.

    `asked`, `happened` and `provenance` are what its file holds. `asked` is the configuration that identifies the run,
    as `mode.config.identity.describe_run` gives it. `request`, `outcome` and `origin` are the same by name, whatever
    version wrote the file.
    """

    @property
    def parts(self) -> tuple[dict[str, Any], ...]:
        """The three parts: asked, happened, provenance."""
        return self.asked, self.happened, self.provenance

    @cached_property
    def upgraded(self) -> dict[str, Any]:
        """The three parts with everything that this version reads."""
        return upgrade({"asked": self.asked, "happened": self.happened, "provenance": self.provenance})

    @cached_property
    def request(self) -> Request:
        """What was asked for."""
        return read_request(self.upgraded["asked"])

    @cached_property
    def outcome(self) -> Outcome:
        """What happened."""
        return read_outcome(self.upgraded["happened"])

    @cached_property
    def origin(self) -> Provenance:
        """Under what conditions."""
        return read_provenance(self.upgraded["provenance"])

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.request.seed

    @property
    def conditions(self) -> str:
        """Data, backbone and precision. Only records with the same conditions can be compared."""
        shown = {"backbone": self.origin.backbone, "precision": self.origin.precision, "data": self.origin.data}
        return json.dumps(shown, sort_keys=True)

    @property
    def overlap(self) -> tuple[str, ...]:
        """Domains whose text differs from what the backbone was pretrained on, so that their splits may overlap it."""
        before = self.origin.pretraining_data
        return tuple(name for name, data in self.origin.data.items() if before.get(name, data) != data)

    @property
    def filename(self) -> str:
        """Name of the record's file: method, targets, seed and id, for people; the id alone decides."""
        method = self.request.method_name.lower()
        return f"{method}-{'-'.join(self.request.targets)}-s{self.seed}-{self.id}.json"


def read_record(path: Path) -> Record:
    """Read one record.

    Raises:
        ConfigError: The file is not a whole record of a known schema.
    """
    return read_measurement(path, Record, SCHEMA, "record", check_parts)


def check_parts(record: Record) -> None:
    """Refuse a record whose parts are not what they should be."""
    if not (isinstance(record.id, str) and all(isinstance(part, dict) for part in record.parts)):
        raise TypeError("its parts are not what they should be")
    _ = record.request, record.outcome, record.origin


def read_records(folder: Path) -> list[Record]:
    """Read every record of a results folder, in the order of their file names."""
    return [read_record(path) for path in sorted((folder / "records").glob("*.json"))]


def find_record(folder: Path, run_id: str) -> Record | None:
    """Return the record of a run in a results folder, if it has one."""
    found = sorted((folder / "records").glob(f"*-{run_id}.json"))
    return read_record(found[0]) if found else None
