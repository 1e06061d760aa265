"""Measurements: JSON files with a configuration, an outcome and a provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from mode.core.errors import ConfigError
from mode.core.files import write_atomic


@dataclass(frozen=True)
class Measurement:
    """A measurement, the content of one JSON file.

    Attributes:
        schema: Version of the file format.
        id: Id, which depends on what was asked.
        asked: Configuration of the measurement.
        happened: Outcome of the measurement.
        provenance: Conditions of the measurement: fingerprints, commit, versions, machine, date.
    """

    schema: int
    id: str
    asked: dict[str, Any]
    happened: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def filename(self) -> str:
        """Name of the file."""
        return f"{self.id}.json"

    def write(self, folder: Path) -> Path:
        """Write the file into a folder, atomically, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.filename
        write_atomic(path, format_json(asdict(self)).encode())
        return path


Kind = TypeVar("Kind", bound=Measurement)


def read_measurement(path: Path, kind: type[Kind], schema: int, what: str, use: Callable[[Kind], object]) -> Kind:
    """Return one measurement, after a check of its content.

    Args:
        path: Path of the file.
        kind: Class of the measurement.
        schema: Version of the file format that this version of `mode` reads.
        what: Name of such a measurement in messages.
        use: Uses the measurement; raises an error if the content is wrong.

    Raises:
        ConfigError: The file is damaged or has another schema.
    """
    try:
        plain = json.loads(path.read_text("utf-8"))
        found = plain.get("schema", schema) if isinstance(plain, dict) else schema
        if found != schema:
            raise ConfigError(f"{path}: {what} schema {found}; this version reads schema {schema}")
        measurement = kind(**plain)
        use(measurement)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a {what} that mode wrote ({error})") from error
    return measurement


Part = TypeVar("Part")


def pick_fields(kind: type[Part], plain: Mapping[str, Any]) -> Part:
    """Return a dataclass from a mapping. Entries that are not fields are ignored."""
    return kind(**{item.name: plain[item.name] for item in fields(kind)})  # type: ignore[arg-type]


def format_json(plain: Mapping[str, Any]) -> str:
    """Return JSON with every list of numbers on one line, so that files stay readable and easy to compare."""
    text = json.dumps(plain, indent=1)
    return re.sub(r"\[[\s\d.,eE+\-]+\]", lambda match: " ".join(match[0].split()), text) + "\n"
