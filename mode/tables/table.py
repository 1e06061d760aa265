"""A table is one YAML with rows of overrides. This module turns it into checked settings and runs."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mode.config import identity
from mode.config.base import STRICT
from mode.config.check import replace_settings, validate
from mode.config.compose import compose, format_value, parse_overrides, rename_overrides
from mode.config.groups import list_members, read_group
from mode.config.run import Run
from mode.core.errors import ConfigError, suggest
from mode.records.metrics import ACCURACY, METRICS, Metric, find_metrics
from mode.tables.columns import list_column_names, parse_column

SIGNS = "†‡§¶"
"""Of notes on rows, in order."""


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9@.\-]*$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Row:
    """One row.

    Attributes:
        name: What the table's other parts, records and commands call it.
        label: What people read.
        overrides: Settings that make its run.
        note: What has to be said of it under the table, such as where it departs from what was published.
    """

    name: Name
    label: str
    overrides: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Published:
    """Values printed in a publication: accuracy in per cent by row and domain."""

    source: str
    note: str = ""
    rows: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Claim:
    """Something a publication says, that a difference between two rows can bear out or not.

    Attributes:
        text: What it says.
        ours: The row that should be ahead.
        theirs: The row that it should be ahead of.
        column: In what: a domain, `average` or `retention`, of the accuracy; with /METRIC, of another metric.
    """

    text: str
    ours: Name
    theirs: Name
    column: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Curves:
    """A panel of a figure: a quality over what rows differ in.

    Attributes:
        title: Heading.
        x: `added`: parameters beside the backbone's, in millions; `examples`: `train.batch.examples`; `share` and
            `weight`: those of `method.anchor`.
        column: The quality.
        lines: Rows of every line, by its label, in order.
    """

    title: str
    x: Literal["added", "examples", "share", "weight"]
    column: str
    lines: dict[str, tuple[Name, ...]]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Table:
    """A table of runs.

    Attributes:
        title: Heading.
        rows: Rows in order; the one named `backbone` is the zero point of retention.
        overrides: Settings of every row.
        seeds: Seeds to run when none are asked for, and all that count where it `settles` settings.
        experiments: Experiments that the table is also rendered for.
        budgets: Budgets that it is also rendered for.
        differences: Pairs of rows whose difference is printed.
        metrics: Metrics shown, each with a column for every domain, the average and retention.
        relative: Whether the metrics are shown as differences to the backbone's.
        claims: What its publication says, to be held against these rows.
        curves: Panels of its figure, in the place of target accuracy over retention.
        choose: Whether to say which of the rows `method@setting` has the best average accuracy for each method.
        published: The paper's own values.
    """

    title: str
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    experiments: tuple[str, ...] = ()
    budgets: tuple[Name, ...] = ()
    differences: tuple[tuple[Name, Name], ...] = ()
    metrics: Annotated[tuple[str, ...], Field(min_length=1)] = (ACCURACY.name,)
    relative: bool = False
    claims: tuple[Claim, ...] = ()
    curves: tuple[Curves, ...] = ()
    choose: bool = False
    published: Published | None = None

    @property
    def settles(self) -> bool:
        """Whether settings are compared on the validation split: then a row has the table's own seeds and no more."""
        return bool(last_value(self.overrides, "evaluate.split") == "validation")

    @property
    def needed(self) -> tuple[Metric, ...]:
        """The metrics that the table is computed from: the accuracy, those shown, and those of claims."""
        claimed = [parse_column(claim.column).metric.name for claim in self.claims]
        return find_metrics(dict.fromkeys([ACCURACY.name, *self.metrics, *claimed]))

    @property
    def variants(self) -> list[list[str]]:
        """The overrides under which the table is rendered: none, and each experiment and budget that it knows."""
        experiments = [[f"experiment={name}"] for name in self.experiments]
        return [[], *experiments, *([f"budget={name}"] for name in self.budgets)]

    @property
    def notes(self) -> dict[str, str]:
        """The notes on rows, each with its sign."""
        return dict(zip(dict.fromkeys(row.note for row in self.rows if row.note), SIGNS, strict=False))

    def marked(self, row: Row) -> str:
        """Return a row's label with the sign of its note."""
        return f"{row.label} {self.notes[row.note]}" if row.note else row.label

    def __post_init__(self) -> None:
        if len({row.note for row in self.rows if row.note}) > len(SIGNS):
            raise ValueError(f"rows have more than {len(SIGNS)} different notes")
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names):
            raise ValueError("two rows have the same name")
        if self.relative and "backbone" not in names:
            raise ValueError("relative needs a row named backbone")
        for part, members in self.named().items():
            for name in members:
                if name not in names:
                    raise ValueError(f"{part} name the row {name}, which the table does not have")

    def named(self) -> dict[str, list[str]]:
        """Return the rows that each part of the table names."""
        return {
            "differences": [name for pair in self.differences for name in pair],
            "claims": [name for claim in self.claims for name in (claim.ours, claim.theirs)],
            "curves": [name for panel in self.curves for rows in panel.lines.values() for name in rows],
        }


def load_table(name: str, extra: Path | None = None, metrics: Sequence[str] = ()) -> Table:
    """Read a table's YAML, with other metrics than its own where some are given.

    Raises:
        ConfigError: There is no such table, or it is malformed.
    """
    table: Table = validate(Table, read_group("table", name, extra), f"table/{name}")
    domains = list_members("domain", extra)
    plain = ["average", "retention", *domains]
    check_columns(name, [panel.column for panel in table.curves], plain)
    check_columns(name, [claim.column for claim in table.claims], list_column_names(domains))
    for metric in table.metrics:
        if metric not in METRICS:
            raise ConfigError(
                f"table/{name}: metric {metric}: not one of {', '.join(METRICS)}{suggest(metric, METRICS)}"
            )
    return choose_metrics(table, metrics) if metrics else table


def choose_metrics(table: Table, names: Sequence[str]) -> Table:
    """Return a table that shows other metrics.

    Raises:
        ConfigError: There is no metric of a name.
    """
    chosen = tuple(dict.fromkeys(metric.name for metric in find_metrics(names)))
    other: Table = replace_settings(table, metrics=chosen)
    return other


def check_columns(name: str, columns: Sequence[str], known: Sequence[str]) -> None:
    """Refuse columns that a table cannot have.

    Raises:
        ConfigError: A column is not known.
    """
    for column in columns:
        if column not in known:
            raise ConfigError(f"table/{name}: column {column}: not one of {', '.join(known)}{suggest(column, known)}")


def compose_row(table: Table, row: Row, seed: int, overrides: Sequence[str], extra: Path | None = None) -> Run:
    """Compose the run of one row and seed; the user's overrides win over the table's, and the row's over both.

    Raises:
        ConfigError: The row's settings do not compose.
    """
    check_fixed(overrides)
    renamed = [text for part in (table.overrides, overrides, row.overrides) for text in rename_overrides(part)]
    everything = [*renamed, f"seed={seed}"]
    run = compose(everything, extra)
    track = replace_settings(run.track, group=run.track.group or table.title.partition(".")[0], name=row.name)
    named: Run = replace_settings(run, track=track)
    return named


def list_rows_under(table: Table, overrides: Sequence[str]) -> tuple[Row, ...]:
    """Return the rows that belong to a table under some settings: under a budget it knows, none with one of its own."""
    if last_value(overrides, "budget") not in table.budgets:
        return table.rows
    return tuple(row for row in table.rows if last_value(row.overrides, "budget") is None)


def compose_rows(table: Table, overrides: Sequence[str], extra: Path | None = None) -> dict[str, Run]:
    """Compose the run of every row with seed 0, by row name; of rows that ask for the same run, the first alone.

    Under some budgets two rows ask for the same.

    Raises:
        ConfigError: A row's settings do not compose.
    """
    found: dict[str, tuple[str, Run]] = {}
    for row in list_rows_under(table, overrides):
        run = compose_row(table, row, 0, overrides, extra)
        found.setdefault(str(identity.describe_run(run)), (row.name, run))
    return dict(found.values())


def select_rows(table: Table, names: Collection[str]) -> Table:
    """Return a table with some of its rows, and the differences between those."""
    rows = tuple(row for row in table.rows if row.name in names)
    pairs = tuple(pair for pair in table.differences if set(pair) <= set(names))
    claims = tuple(claim for claim in table.claims if {claim.ours, claim.theirs} <= set(names))
    shorter: Table = replace_settings(
        table, rows=rows, differences=pairs, claims=claims, curves=keep_settings(table, names)
    )
    return shorter


def keep_settings(table: Table, names: Collection[str]) -> tuple[Curves, ...]:
    """Return a table's panels with some of its rows."""
    found = []
    for panel in table.curves:
        lines = {label: tuple(name for name in rows if name in names) for label, rows in panel.lines.items()}
        found.append(replace_settings(panel, lines=lines))
    return tuple(found)


def check_fixed(overrides: Sequence[str]) -> None:
    """Refuse overrides that the rows would beat in silence.

    Raises:
        ConfigError: An override sets the method or the seed.
    """
    for item in parse_overrides(overrides):
        if item.key == "seed":
            raise ConfigError(f"{item.text}: a table is made for a list of seeds: seeds=[{item.value}]")
        if item.key == "method":
            raise ConfigError(f"{item.text}: the rows of a table choose their methods")


def file_stem(name: str, overrides: Sequence[str], own: Sequence[str] = (), metrics: Sequence[str] = ()) -> str:
    """Return the file name, without suffix, of a table under an experiment and a budget, with metrics that were chosen.

    Any other setting that the table does not have of its own adds a short digest, so that the table of other runs
    never replaces the usual one.

    >>> file_stem("table1", ["experiment=table1_long"]), file_stem("table1", ["budget=data"])
    ('table1_long', 'table1-data')
    >>> file_stem("table1", ["train.steps=20"]), file_stem("table1", [], metrics=["loss"])
    ('table1-f7c525', 'table1-loss')
    """
    free = ("experiment", "budget", "paths", "track")
    known = [(item.key, item.value) for item in parse_overrides(own)]
    others = [
        f"{item.key}={format_value(item.value)}"
        for item in parse_overrides(overrides)
        if (item.key, item.value) not in known and item.key.partition(".")[0] not in free
    ]
    digest = f"-{hashlib.sha256(' '.join(sorted(others)).encode()).hexdigest()[:6]}" if others else ""
    budget = last_value(overrides, "budget")
    if budget not in (None, "paper"):
        digest = f"-{budget}{digest}"
    digest += "".join(f"-{metric}" for metric in metrics)
    experiment = last_value(overrides, "experiment")
    if experiment in (None, name):
        return name + digest
    return (experiment if experiment.startswith(name) else f"{name}-{experiment}") + digest


def last_value(overrides: Sequence[str], name: str) -> Any:
    """Return what overrides set a setting or choose of a group, the last of them winning; None if they do not.

    >>> last_value(["seed=1", "++evaluate.split='validation'"], "evaluate.split")
    'validation'
    """
    found = [item.value for item in parse_overrides(overrides) if item.key == name]
    return found[-1] if found else None
