"""Measurements that are no runs: a folder of JSON beside the records, and a sheet that follows from it alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from mode.checked import ConfigError
from mode.files import write_atomic
from mode.record import legible


@dataclass(frozen=True)
class Measurement:
    """What something measured leaves.

    Attributes:
        schema: Version of this layout.
        id: Identity: what was asked.
        asked: What was to be measured.
        happened: What was measured.
        provenance: Under what sky: fingerprints, commit, versions, machine, date.
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
        path = folder / self.filename
        write_atomic(path, legible(asdict(self)).encode())
        return path


Kind = TypeVar("Kind", bound=Measurement)


@dataclass(frozen=True)
class Sheet(Generic[Kind]):
    """A folder of measurements in a folder of results, and the sheet that lies beside it.

    Attributes:
        name: Name of the folder, and of the sheet's files.
        what: What people call one of the measurements.
        kind: Its class.
        schema: The version of its layout that this version reads.
        make: The command that makes one.
        render: Turns measurements into text by file suffix: md, and what others there are.
    """

    name: str
    what: str
    kind: type[Kind]
    schema: int
    make: str
    render: Callable[[Sequence[Kind]], dict[str, str]]

    def read(self, results: Path) -> list[Kind]:
        """Read every measurement of a folder of results, in the order of their file names.

        Raises:
            ConfigError: A file is not a whole one of a known schema.
        """
        return [self.read_file(path) for path in sorted((results / self.name).glob("*.json"))]

    def read_file(self, path: Path) -> Kind:
        """Read one measurement, and see that it can be rendered.

        Raises:
            ConfigError: The file is not a whole one of a known schema.
        """
        try:
            plain = json.loads(path.read_text("utf-8"))
            found = plain.get("schema", self.schema) if isinstance(plain, dict) else self.schema
            if found != self.schema:
                raise ConfigError(f"{path}: {self.what} schema {found}; this version reads schema {self.schema}")
            measurement = self.kind(**plain)
            self.render([measurement])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path}: not a {self.what} that mode wrote ({error})") from error
        return measurement

    def report(self, results: Path, *, write: bool = True) -> tuple[str, Path]:
        """Render the measurements of a folder of results and, with `write`, put the sheet beside them.

        Returns:
            The Markdown, and the path of its file.

        Raises:
            ConfigError: There is none.
        """
        found = self.read(results)
        if not found:
            raise ConfigError(f"no {self.what} in {results / self.name}: make one with `{self.make}`")
        texts = self.render(found)
        if write:
            for suffix, text in texts.items():
                (results / f"{self.name}.{suffix}").write_text(text, encoding="utf-8")
        return texts["md"], results / f"{self.name}.md"

    def stale(self, results: Path, suffixes: Sequence[str] = ("md", "csv")) -> list[Path]:
        """Return the sheet's committed files that no longer follow from the measurements."""
        found = self.read(results)
        texts = self.render(found) if found else {}
        paths = {suffix: results / f"{self.name}.{suffix}" for suffix in suffixes}
        there = {suffix: path.read_text("utf-8") if path.exists() else None for suffix, path in paths.items()}
        return [path for suffix, path in paths.items() if there[suffix] != texts.get(suffix)]
