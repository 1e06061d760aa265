"""Collections: folders of measurements other than runs, each with one report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Generic

from mode.core.errors import NothingError
from mode.core.files import find_paths, read_existing, write_atomic
from mode.records.measurement import Kind, read_measurement

COLLECTIONS = {
    "bench": "mode.bench.records",
    "downstream": "mode.downstream.results",
    "mixed": "mode.downstream.mixed_results",
    "pruning": "mode.artefacts.prune_results",
}
"""Collections that `mode report` renders, by name, with the module of each. A collection has no table YAML."""


@dataclass(frozen=True)
class Collection(Generic[Kind]):
    """A folder of measurements in the results folder, and the report beside it.

    Attributes:
        name: Name of the folder, and of the report's files.
        what: Name of one measurement in messages.
        kind: Class of a measurement.
        schema: Version of the file format that this version of `mode` reads.
        make: Command that makes a measurement.
        render: Renders measurements as text, by file suffix: md, and possibly others.
        draw: Draws the figures of measurements into a folder.
    """

    name: str
    what: str
    kind: type[Kind]
    schema: int
    make: str
    render: Callable[[Sequence[Kind]], dict[str, str]]
    draw: Callable[[Sequence[Kind], Path], None] = lambda found, folder: None

    def read(self, results: Path) -> list[Kind]:
        """Return all measurements in a results folder, in order of file name.

        Raises:
            ConfigError: A file is damaged or has another schema.
        """
        return read_existing(find_paths(results / self.name, "*.json"), self.read_file)

    def read_file(self, path: Path) -> Kind:
        """Return one measurement, after a check that it can be rendered.

        Raises:
            ConfigError: The file is damaged or has another schema.
        """
        return read_measurement(path, self.kind, self.schema, self.what, lambda found: self.render([found]))

    def report(self, results: Path, *, write: bool = True) -> tuple[str, Path]:
        """Render the measurements in a results folder and, with `write`, write the report beside them.

        Returns:
            The report in Markdown, and the path of its file.

        Raises:
            ConfigError: A file is damaged or has another schema.
            NothingError: There is no measurement.
        """
        found = self.read(results)
        if not found:
            raise NothingError(f"no {self.what} in {results / self.name}: make one with `{self.make}`")
        texts = self.render(found)
        if write:
            for suffix, text in texts.items():
                write_atomic(results / f"{self.name}.{suffix}", text.encode())
            self.draw(found, results)
        return texts["md"], results / f"{self.name}.md"

    def stale(self, results: Path, suffixes: Sequence[str] = ("md", "csv")) -> list[Path]:
        """Return the paths of committed report files that differ from a new rendering of the measurements."""
        found = self.read(results)
        texts = self.render(found) if found else {}
        paths = {suffix: results / f"{self.name}.{suffix}" for suffix in suffixes}
        there = {suffix: path.read_text("utf-8") if path.exists() else None for suffix, path in paths.items()}
        return [path for suffix, path in paths.items() if there[suffix] != texts.get(suffix)]


def find_collection(name: str) -> Collection[Any]:
    """Return a collection by its name in `COLLECTIONS`. Its module is imported here, because some imports are slow."""
    collection: Collection[Any] = import_module(COLLECTIONS[name]).COLLECTION
    return collection
