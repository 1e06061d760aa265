"""Collections: folders of measurements that are no runs, and the report that follows from each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Generic

from mode.core.errors import NothingError
from mode.records.measurement import Kind, read_measurement

COLLECTIONS = {
    "bench": "mode.bench.records",
    "downstream": "mode.downstream.results",
    "pruning": "mode.artefacts.prune_results",
}
"""What `mode report` renders from a folder of its own and not by a table's YAML, with the module of each."""


@dataclass(frozen=True)
class Collection(Generic[Kind]):
    """A folder of measurements in a folder of results, and the report that lies beside it.

    Attributes:
        name: Name of the folder, and of the report's files.
        what: What people call one of the measurements.
        kind: Its class.
        schema: The version of its layout that this version reads.
        make: The command that makes one.
        render: Turns measurements into text by file suffix: md, and what others there are.
        draw: Draws what figures there are of measurements into a folder.
    """

    name: str
    what: str
    kind: type[Kind]
    schema: int
    make: str
    render: Callable[[Sequence[Kind]], dict[str, str]]
    draw: Callable[[Sequence[Kind], Path], None] = lambda found, folder: None

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
        return read_measurement(path, self.kind, self.schema, self.what, lambda found: self.render([found]))

    def report(self, results: Path, *, write: bool = True) -> tuple[str, Path]:
        """Render the measurements of a folder of results and, with `write`, put the report beside them.

        Returns:
            The Markdown, and the path of its file.

        Raises:
            ConfigError: A file is not a whole one of a known schema; `NothingError`: there is none.
        """
        found = self.read(results)
        if not found:
            raise NothingError(f"no {self.what} in {results / self.name}: make one with `{self.make}`")
        texts = self.render(found)
        if write:
            for suffix, text in texts.items():
                (results / f"{self.name}.{suffix}").write_text(text, encoding="utf-8")
            self.draw(found, results)
        return texts["md"], results / f"{self.name}.md"

    def stale(self, results: Path, suffixes: Sequence[str] = ("md", "csv")) -> list[Path]:
        """Return the report's committed files that no longer follow from the measurements."""
        found = self.read(results)
        texts = self.render(found) if found else {}
        paths = {suffix: results / f"{self.name}.{suffix}" for suffix in suffixes}
        there = {suffix: path.read_text("utf-8") if path.exists() else None for suffix, path in paths.items()}
        return [path for suffix, path in paths.items() if there[suffix] != texts.get(suffix)]


def find_collection(name: str) -> Collection[Any]:
    """Return a collection by its name in `COLLECTIONS`; its module is imported now, since some are slow to import."""
    collection: Collection[Any] = import_module(COLLECTIONS[name]).COLLECTION
    return collection
