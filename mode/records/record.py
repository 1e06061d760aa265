"""The record of a run: configuration, outcome and provenance. Tables and figures are functions of records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mode.config.identity import digest_run
from mode.core.escape import check_name
from mode.core.files import find_paths, read_existing
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
"""Version of the file format."""


@dataclass(frozen=True)
class Record(Measurement):
    """The record of a finished run.

    `asked`, `happened` and `provenance` are the content of the file. `asked` is the configuration that identifies the
    run, as `mode.config.identity.describe_run` returns it. `request`, `outcome` and `origin` are the typed contents,
    independent of the version that wrote the file.
    """

    @property
    def parts(self) -> tuple[dict[str, Any], ...]:
        """The three parts of the file: asked, happened, provenance."""
        return self.asked, self.happened, self.provenance

    @cached_property
    def upgraded(self) -> dict[str, Any]:
        """The three parts with all fields that this version reads."""
        return upgrade({"asked": self.asked, "happened": self.happened, "provenance": self.provenance})

    @cached_property
    def request(self) -> Request:
        """The configuration of the run, typed."""
        return read_request(self.upgraded["asked"])

    @cached_property
    def outcome(self) -> Outcome:
        """The outcome of the run, typed."""
        return read_outcome(self.upgraded["happened"])

    @cached_property
    def origin(self) -> Provenance:
        """The provenance of the run, typed."""
        return read_provenance(self.upgraded["provenance"])

    def compute_id(self) -> str:
        """Return the id that follows from what was asked and from the fingerprints of data and backbone."""
        return digest_run(self.asked, {**self.provenance["data"], "backbone": self.provenance["backbone"]})

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.request.seed

    @property
    def conditions(self) -> str:
        """Data, backbone and precision as text. Only records with equal conditions are comparable."""
        shown = {"backbone": self.origin.backbone, "precision": self.origin.precision, "data": self.origin.data}
        return json.dumps(shown, sort_keys=True)

    @property
    def overlap(self) -> tuple[str, ...]:
        """Domains whose text differs from the pretraining text, so that their splits may overlap with it."""
        before = self.origin.pretraining_data
        return tuple(name for name, data in self.origin.data.items() if before.get(name, data) != data)

    @property
    def filename(self) -> str:
        """Name of the file: method, targets, seed and id. Only the id identifies the run; the rest is for readers."""
        method = self.request.method_name.lower()
        return f"{method}-{'-'.join(self.request.targets)}-s{self.seed}-{self.id}.json"


def read_record(path: Path) -> Record:
    """Return one record.

    Raises:
        ConfigError: The file is damaged or has another schema.
    """
    return read_measurement(path, Record, SCHEMA, "record", check_parts)


def check_parts(record: Record) -> None:
    """Check the types of a record's parts, the names of its domains, and that its scores agree with their sums.

    Raises:
        TypeError: The id is not a string, or a part is not a mapping.
        ValueError: The name of a domain is not a name, the scores are of other domains or another split, or a number
            differs from what it sums up.
    """
    if not (isinstance(record.id, str) and all(isinstance(part, dict) for part in record.parts)):
        raise TypeError("the id must be a string, and asked, happened and provenance mappings")
    _ = record.request, record.origin
    outcome, data = record.outcome, record.provenance["data"]
    for name in (*record.request.targets, *outcome.scores, *data):
        check_name(name)
    if not data or outcome.scores.keys() != data.keys():
        raise ValueError(f"scores of {', '.join(outcome.scores) or 'no domain'}, data of {', '.join(data) or 'none'}")
    if outcome.split != record.asked["evaluate"]["split"]:
        raise ValueError(f"scores on {outcome.split}, but {record.asked['evaluate']['split']} was asked")
    for name, score in outcome.scores.items():
        try:
            score.check()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def read_records(folder: Path) -> list[Record]:
    """Return all records of a results folder, in order of file name."""
    return read_existing(find_paths(folder / "records", "*.json"), read_record)


def find_record(folder: Path, run_id: str) -> Record | None:
    """Return the record of a run in a results folder; None if there is none."""
    found = read_existing(find_paths(folder / "records", f"*-{run_id}.json"), read_record)
    return found[0] if found else None
