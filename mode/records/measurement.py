"""Measurements: JSON files with a configuration, an outcome and a provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from mode.core.digests import digest_json
from mode.core.errors import ConfigError, summarize_error
from mode.core.files import write_atomic

DIGEST = "digest"
"""Key of the digest of a file's other content. Files of earlier versions do not have it."""


@dataclass(frozen=True)
class Measurement:
    """A measurement, the content of one JSON file.

    Attributes:
        schema: Version of the file format.
        id: Id, the digest of what was asked (`compute_id`).
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

    def compute_id(self) -> str:
        """Return the id that follows from the content."""
        return make_id(self.asked)

    def write(self, folder: Path) -> Path:
        """Write the file into a folder, atomically, with a digest of its content, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path, plain = folder / self.filename, asdict(self)
        write_atomic(path, format_json({**plain, DIGEST: digest_json(plain)}).encode())
        return path


Kind = TypeVar("Kind", bound=Measurement)


def read_measurement(path: Path, kind: type[Kind], schema: int, what: str, use: Callable[[Kind], object]) -> Kind:
    """Return one measurement, after a check of its content, its id, its file name and its digest.

    The id must follow from the content, and the file name from both. So a file that was edited or renamed is not taken
    for another measurement. The digest covers the numbers that nothing else proves, such as seconds.

    Args:
        path: Path of the file.
        kind: Class of the measurement.
        schema: Version of the file format that this version of `mode` reads.
        what: Name of such a measurement in messages.
        use: Uses the measurement; raises an error if the content is wrong.

    Raises:
        ConfigError: The file is damaged, has another schema, or its id, name or digest is that of other content.
    """
    try:
        plain = json.loads(path.read_text("utf-8"))
        found = plain.get("schema", schema) if isinstance(plain, dict) else schema
        if found != schema:
            raise ConfigError(f"{path}: {what} schema {found}; this version reads schema {schema}")
        digest = plain.pop(DIGEST, None)
        measurement = kind(**plain)
        use(measurement)
        expected, name = measurement.compute_id(), measurement.filename
    except CONTENT_ERRORS as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a {what} that mode wrote ({describe_error(error)})") from error
    if measurement.id != expected:
        raise ConfigError(
            f"{path}: changed since it was written: its id is {measurement.id}, but what it holds has the id {expected}"
        )
    if path.name != name:
        raise ConfigError(f"{path}: the name of another {what}; the name of this {what} is {name}")
    if digest is not None and digest != digest_json(plain):
        raise ConfigError(f"{path}: changed since it was written: the digest of this {what} is that of other content")
    return measurement


CONTENT_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, ZeroDivisionError, RecursionError)
"""Errors of reading a file with wrong content."""


def describe_error(error: BaseException) -> str:
    """Return the first line of an error's message.

    >>> describe_error(KeyError("seed")), describe_error(RecursionError("maximum recursion depth exceeded"))
    ("no 'seed'", 'nested too deeply')
    """
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, KeyError):
        return f"no {error}"
    return summarize_error(error)


def make_id(value: object) -> str:
    """Return the id of a measurement: a short digest of plain data.

    >>> make_id({"run": "a", "task": "b"}) == make_id({"task": "b", "run": "a"})
    True
    """
    return digest_json(value)[:12]


Part = TypeVar("Part")


def pick_fields(kind: type[Part], plain: Mapping[str, Any]) -> Part:
    """Return a dataclass from a mapping. Entries that are not fields are ignored.

    Raises:
        KeyError: A field is missing.
        TypeError: A value has another type than its field.
    """
    checks = find_checks(kind)  # type: ignore[arg-type]
    values = {name: plain[name] for name in checks}
    for name, fits in checks.items():
        if not fits(values[name]):
            raise TypeError(f"{name}: not {values[name]!r:.60}")
    return kind(**values)


@cache
def find_checks(kind: Any) -> dict[str, Callable[[Any], bool]]:
    """Return, for every field of a dataclass, a function that says whether a value has the type of the field."""
    hints = get_type_hints(kind)
    return {item.name: make_check(hints[item.name]) for item in fields(kind)}


PLAIN: Mapping[Any, frozenset[type]] = {
    **{kind: frozenset({kind}) for kind in (str, bool, int, type(None))},
    float: frozenset({float, int}),
}
"""Types of the values of a field with a plain type."""


def list_plain(kind: Any) -> frozenset[type]:
    """Return the types of the values of a plain type or of a union of plain types; an empty set for other types."""
    kinds = [PLAIN.get(each, frozenset()) for each in (get_args(kind) if get_origin(kind) is UnionType else (kind,))]
    return frozenset().union(*kinds) if all(kinds) else frozenset()


def make_check(kind: Any) -> Callable[[Any], bool]:
    """Return a function that says whether a value has a type. A list fits a tuple.

    >>> check = make_check(Mapping[str, float | None])
    >>> check({"a": 1, "b": None}), check({"a": "1"}), check([])
    (True, False, False)
    """
    origin, inner = get_origin(kind), get_args(kind)
    if plain := list_plain(kind):
        return lambda value: type(value) in plain
    if origin is UnionType:
        checks = [make_check(each) for each in inner]
        return lambda value: any(check(value) for check in checks)
    if origin not in (Mapping, Sequence, tuple):
        return lambda value: kind is Any or isinstance(value, kind)
    all_fit = make_items_check(inner[1] if origin is Mapping else inner[0])
    if origin is Mapping:
        return lambda value: isinstance(value, dict) and all_fit(value.values())
    return lambda value: isinstance(value, (list, tuple)) and all_fit(value)


def make_items_check(kind: Any) -> Callable[[Iterable[Any]], bool]:
    """Return a function that says whether all of several values have a type."""
    plain, fits = list_plain(kind), make_check(kind)
    if plain:
        return lambda values: plain.issuperset(map(type, values))
    return lambda values: all(map(fits, values))


def format_json(plain: Mapping[str, Any]) -> str:
    """Return JSON with every list of numbers on one line, so that files stay readable and easy to compare."""
    text = json.dumps(plain, indent=1)
    return re.sub(r"\[[\s\d.,eE+\-]+\]", lambda match: " ".join(match[0].split()), text) + "\n"
