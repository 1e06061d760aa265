"""What something measured leaves as one JSON file: what was asked, what happened, and under what conditions."""

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
    """What something measured leaves.

    Attributes:
        schema: Version of this layout.
        id: Identity: what was asked.
        asked: What was to be measured.
        happened: What was measured.
        provenance: Under what conditions: fingerprints, commit, versions, machine, date.
    """

    schema: int
    id: str
    asked: dict[str, Any]
    happened: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def filename(self) -> str:
        """Name of its file."""
        return f"{self.id}.json"

    def write(self, folder: Path) -> Path:
        """Write it into a folder, atomically, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.filename
        write_atomic(path, format_json(asdict(self)).encode())
        return path


Kind = TypeVar("Kind", bound=Measurement)


def read_measurement(path: Path, kind: type[Kind], schema: int, what: str, use: Callable[[Kind], object]) -> Kind:
    """Read one measurement, and see that it can be used.

    Args:
        path: Its file.
        kind: Its class.
        schema: The version of its layout that this version reads.
        what: What people call it.
        use: Does with it what it is for; fails if it is not what it should be.

    Raises:
        ConfigError: The file is not a whole one of that schema.
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
    """Make a dataclass of those entries of a mapping that are its fields."""
    return kind(**{item.name: plain[item.name] for item in fields(kind)})  # type: ignore[arg-type]


def format_json(plain: Mapping[str, Any]) -> str:
    """Render JSON in which long lists of numbers stay on one line, so that it can be read and compared."""
    text = json.dumps(plain, indent=1)
    return re.sub(r"\[[\s\d.,eE+\-]+\]", lambda match: " ".join(match[0].split()), text) + "\n"
