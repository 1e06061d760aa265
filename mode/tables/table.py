"""Tables: a YAML file with rows of overrides, as checked settings, and the runs of its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mode.config import identity
from mode.config.base import STRICT
from mode.config.check import replace_settings, validate
from mode.config.compose import compose, parse_overrides, rename_overrides
from mode.config.groups import list_members, read_group
from mode.config.quoting import format_value
from mode.config.run import Run
from mode.core.errors import ConfigError, suggest
from mode.records.metrics import ACCURACY, METRICS, Metric, find_metrics
from mode.tables.columns import AVERAGE, RETENTION, TARGET, list_column_names, parse_column

SIGNS = "†‡§¶"
"""Signs of the notes on rows, in order."""


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9@.\-]*$")]
"""Name of a row."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Row:
    """A row.

    Attributes:
        name: Name in other parts of the table, in trackers and in commands.
        label: Label in the rendered table.
        overrides: Settings of the row's run.
        note: Note under the table, such as a deviation from the publication.
        chosen_in: Tables and the methods of their rows, `TABLE/METHOD`, whose settings this row's were chosen from.
        under: Further settings of the run under an experiment, by the experiment's name.
    """

    name: Name
    label: str
    overrides: tuple[str, ...]
    note: str = ""
    chosen_in: tuple[Annotated[str, Field(pattern=r"^[^/]+/[^/]+$")], ...] = ()
    under: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Published:
    """Values from a publication.

    Attributes:
        source: The publication.
        note: Note under the values.
        rows: Accuracy in per cent, by row and domain.
    """

    source: str
    note: str = ""
    rows: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Claim:
    """A claim of a publication that a difference between two rows can test.

    Attributes:
        text: The claim.
        ours: Row that should be better.
        theirs: Row that should be worse.
        column: Column of the comparison: a domain, `average` or `retention`; with /METRIC for a metric other than the
            accuracy.
    """

    text: str
    ours: Name
    theirs: Name
    column: str


CURVE_COSTS = ("total", "generation", "own")
"""Costs that a curve can show: parameters, operations of a token, and weight of the branches named like a domain."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Curves:
    """A panel of a figure: a quality or a cost over a setting in which rows differ.

    Attributes:
        title: Heading.
        x: Quantity of the x axis: `added`, the parameters added to the backbone, in millions; `domains`, the number of
            targets; `examples`, which is `train.batch.examples`; `share` or `weight` of `method.anchor`.
        column: Column of the quality, or one of `CURVE_COSTS`.
        lines: Names of the rows of every line, in order, by the label of the line.
    """

    title: str
    x: Literal["added", "domains", "examples", "share", "weight"]
    column: str
    lines: dict[str, tuple[Name, ...]]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Table:
    """A table of runs.

    Attributes:
        title: Heading.
        rows: Rows in order. The row named `backbone` is the reference of retention.
        overrides: Settings of all rows.
        seeds: Seeds to run by default. If the table `settles` settings, only these seeds count.
        experiments: Experiments with a rendering of their own.
        budgets: Budgets with a rendering of their own.
        differences: Pairs of rows whose difference is shown.
        metrics: Metrics shown, each with a column for every domain, the average and retention.
        relative: Whether metrics are shown as differences from the backbone.
        claims: Claims of the publication to test.
        curves: Panels of the figure, in place of target accuracy over retention.
        choose: Whether to name, for each method, the row `method@setting` with the best average accuracy.
        frontiers: Whether to compare methods by what their rows `method@setting` reach at every loss of retention.
        published: Values from the publication.
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
    frontiers: bool = False
    published: Published | None = None

    @property
    def settles(self) -> bool:
        """Whether the table compares settings on the validation split. Rows then have only the table's own seeds."""
        return bool(last_value(self.overrides, "evaluate.split") == "validation")

    @property
    def needed(self) -> tuple[Metric, ...]:
        """Metrics that the table needs: the accuracy, the metrics shown, and those of claims."""
        claimed = [parse_column(claim.column).metric.name for claim in self.claims]
        return find_metrics(dict.fromkeys([ACCURACY.name, *self.metrics, *claimed]))

    @property
    def variants(self) -> list[list[str]]:
        """Overrides of every rendering: none, each of `experiments`, and each of `budgets`."""
        experiments = [[f"experiment={name}"] for name in self.experiments]
        return [[], *experiments, *([f"budget={name}"] for name in self.budgets)]

    @property
    def notes(self) -> dict[str, str]:
        """Signs of the notes on rows, by note."""
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
        """Return the names of rows in each part of the table."""
        return {
            "differences": [name for pair in self.differences for name in pair],
            "claims": [name for claim in self.claims for name in (claim.ours, claim.theirs)],
            "curves": [name for panel in self.curves for rows in panel.lines.values() for name in rows],
        }


def load_table(name: str, extra: Path | None = None, metrics: Sequence[str] = ()) -> Table:
    """Return a table from its YAML.

    Args:
        name: Name of the table.
        extra: A folder of the user's own configuration.
        metrics: Metrics to show in place of the table's own; none for the table's own.

    Raises:
        ConfigError: There is no such table, or its YAML is malformed.
    """
    table: Table = validate(Table, read_group("table", name, extra), f"table/{name}")
    domains = list_members("domain", extra)
    plain = [AVERAGE, TARGET, RETENTION, *domains]
    check_columns(name, [panel.column for panel in table.curves], [*plain, *CURVE_COSTS])
    check_columns(name, [claim.column for claim in table.claims], list_column_names(domains))
    for metric in table.metrics:
        if metric not in METRICS:
            raise ConfigError(
                f"table/{name}: metric {metric}: not one of {', '.join(METRICS)}{suggest(metric, METRICS)}"
            )
    return choose_metrics(table, metrics) if metrics else table


def choose_metrics(table: Table, names: Sequence[str]) -> Table:
    """Return a table with other metrics.

    Raises:
        ConfigError: A name is not the name of a metric.
    """
    chosen = tuple(dict.fromkeys(metric.name for metric in find_metrics(names)))
    other: Table = replace_settings(table, metrics=chosen)
    return other


def check_columns(name: str, columns: Sequence[str], known: Sequence[str]) -> None:
    """Check names of columns.

    Args:
        name: Name of the table, for the message.
        columns: Names to check.
        known: Names of existing columns.

    Raises:
        ConfigError: A column does not exist.
    """
    for column in columns:
        if column not in known:
            raise ConfigError(f"table/{name}: column {column}: not one of {', '.join(known)}{suggest(column, known)}")


def compose_row(table: Table, row: Row, seed: int, overrides: Sequence[str], extra: Path | None = None) -> Run:
    """Return the run of one row and seed.

    The user's overrides take precedence over the table's, and the row's over both: first its own, then those under the
    experiment.

    Raises:
        ConfigError: The row's settings do not compose.
    """
    check_fixed(overrides)
    under = row.under.get(str(last_value([*table.overrides, *overrides], "experiment")), ())
    parts = (table.overrides, overrides, row.overrides, under)
    renamed = [text for part in parts for text in rename_overrides(part)]
    everything = [*renamed, f"seed={seed}"]
    run = compose(everything, extra)
    track = replace_settings(run.track, group=run.track.group or table.title.partition(".")[0], name=row.name)
    named: Run = replace_settings(run, track=track)
    return named


def list_rows_under(table: Table, overrides: Sequence[str], extra: Path | None = None) -> tuple[Row, ...]:
    """Return the rows of a table under some overrides; under one of its budgets, without rows that set a budget.

    The budget is that of the overrides, or that of the experiment that they name.
    """
    budget, experiment = last_value(overrides, "budget"), last_value(overrides, "experiment")
    if budget is None and experiment is not None:
        budget = compose([f"experiment={experiment}"], extra).budget.policy
    if budget not in table.budgets:
        return table.rows
    return tuple(row for row in table.rows if last_value(row.overrides, "budget") is None)


def compose_rows(table: Table, overrides: Sequence[str], extra: Path | None = None) -> dict[str, Run]:
    """Return the run of every row with seed 0, by row name. Of rows with the same run, only the first is kept.

    Under some budgets two rows have the same run.

    Raises:
        ConfigError: A row's settings do not compose.
    """
    found: dict[str, tuple[str, Run]] = {}
    for row in list_rows_under(table, overrides, extra):
        run = compose_row(table, row, 0, overrides, extra)
        found.setdefault(str(identity.describe_run(run)), (row.name, run))
    return dict(found.values())


def select_rows(table: Table, names: Collection[str]) -> Table:
    """Return a table with some of its rows, and with the differences, claims and curves of these rows."""
    rows = tuple(row for row in table.rows if row.name in names)
    pairs = tuple(pair for pair in table.differences if set(pair) <= set(names))
    claims = tuple(claim for claim in table.claims if {claim.ours, claim.theirs} <= set(names))
    shorter: Table = replace_settings(
        table, rows=rows, differences=pairs, claims=claims, curves=keep_settings(table, names)
    )
    return shorter


def keep_settings(table: Table, names: Collection[str]) -> tuple[Curves, ...]:
    """Return the panels of a table with some of its rows."""
    found = []
    for panel in table.curves:
        lines = {label: tuple(name for name in rows if name in names) for label, rows in panel.lines.items()}
        found.append(replace_settings(panel, lines=lines))
    return tuple(found)


def check_fixed(overrides: Sequence[str]) -> None:
    """Refuse overrides that the rows would override silently.

    Raises:
        ConfigError: An override sets the method or the seed.
    """
    for item in parse_overrides(overrides):
        if item.key == "seed":
            raise ConfigError(f"{item.text}: a table is made for a list of seeds: seeds=[{item.value}]")
        if item.key == "method":
            raise ConfigError(f"{item.text}: the rows of a table choose their methods")


def file_stem(name: str, overrides: Sequence[str], own: Sequence[str] = (), metrics: Sequence[str] = ()) -> str:
    """Return the file name of a rendered table, without suffix.

    The name contains the experiment, the budget and chosen metrics. All other overrides add a short digest, so that a
    table of other runs does not replace the default one.

    Args:
        name: Name of the table.
        overrides: The user's overrides.
        own: Overrides of the table, which do not add a digest.
        metrics: Metrics chosen in place of the table's own.

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
    """Return the value that overrides give to a setting or a group; None if they do not set it. The last one counts.

    >>> last_value(["seed=1", "++evaluate.split='validation'"], "evaluate.split")
    'validation'
    """
    found = [item.value for item in parse_overrides(overrides) if item.key == name]
    return found[-1] if found else None
