"""The details of one run on the page: settings, scores, cost, provenance, curves, record, and command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mode.config.check import flatten
from mode.records.command import write_commands
from mode.records.contents import Outcome, Provenance
from mode.records.metrics import METRICS, Metric
from mode.records.record import Record
from mode.records.score import Score
from mode.report.charts import chart_to_svg
from mode.report.training_charts import chart_run
from mode.tables.compile import TableData
from mode.tables.select import add_needed

Fact = tuple[str, str]
"""A name and its value."""


def describe_costs(outcome: Outcome) -> Iterator[Fact]:
    """Yield the costs of a run's own stage. Earlier records do not hold all of them."""
    for name, value, form in (
        ("Steps", outcome.steps, ","),
        ("Tokens", outcome.tokens, ","),
        ("Seconds", outcome.seconds, ",.1f"),
        ("Tokens/s", outcome.tokens_per_second, ",.0f"),
        ("Peak learning rate", outcome.lr, "g"),
        ("Parameters", outcome.parameters.total, ","),
        ("Trained parameters", outcome.parameters.trainable, ","),
        ("Added parameters", outcome.parameters.added, ","),
        ("Operations", outcome.flops, ".4g"),
        ("Peak memory (bytes)", outcome.peak_memory_bytes, ","),
        ("Kept on disk (bytes)", outcome.kept_bytes, ","),
        ("Scoring seconds", outcome.evaluation_seconds, ",.1f"),
    ):
        if value is not None:
            yield name, format(value, form)


def describe_scores(record: Record) -> Iterator[tuple[str, ...]]:
    """Yield a row per scored domain: name, target or retention, all metrics, and the number of tokens."""
    for name, score in record.outcome.scores.items():
        kind = "target" if name in record.request.targets else "retention"
        yield name, kind, *(format_metric(score, metric) for metric in METRICS.values()), f"{score.tokens:,}"


def format_metric(score: Score, metric: Metric) -> str:
    """Return a metric with its standard error as text; a dash if the record does not hold the metric."""
    value, error = score.find(metric), score.find_error(metric)
    if value is None:
        return "–"
    return metric.format(value) + ("" if error is None else f" ± {metric.format(error)}")


def make_title(method: str, labels: Sequence[str]) -> str:
    """Return the title of a run: the first complete label of its rows, else the method with the first label.

    >>> make_title("MoDE", ["... B 2", "MoDE, B 2"]), make_title("MoDE", ["... B 2"]), make_title("MoDE", [])
    ('MoDE, B 2', 'MoDE ... B 2', 'MoDE')
    """
    whole = [label for label in labels if not label.startswith("...")]
    return next(iter(whole), " ".join([method, *labels[:1]]))


def describe_origin(origin: Provenance) -> Iterator[Fact]:
    """Yield the provenance of a run: code, versions, machine and data."""
    if origin.commit is not None:
        yield "Commit", f"{origin.commit}{' with changes' if origin.dirty else ''}"
    if origin.date is not None:
        yield "Date", origin.date
    if origin.machine:
        yield "Machine", ", ".join(f"{name} {value}" for name, value in origin.machine.items())
    if origin.threads is not None:
        yield "Threads", str(origin.threads)
    yield "Precision", origin.precision
    if origin.versions:
        yield "Versions", ", ".join(f"{name} {value}" for name, value in origin.versions.items() if value)
    yield "Backbone", origin.backbone
    yield "Data", ", ".join(f"{name} {value}" for name, value in origin.data.items())


@dataclass(frozen=True)
class RunDetails:
    """The details of a run.

    Attributes:
        id: Id of the run.
        title: Method of the run, or label of its row in a table.
        about: Targets, seed, backbone and split, in one line.
        rows: Table rows of the run: anchor, title of the table, and label.
        settings: Settings of the run, as `key=value`.
        scores: A row per domain: name, target or retention, all metrics with standard errors, tokens.
        costs: Costs of training and scoring.
        origin: Commit, versions, machine, date and fingerprints.
        needs: Ids of the earlier stages.
        curve: Figure of the training curve; empty without training.
        file: Path of the record, relative to the page.
        command: Command for the run, or the reason why there is none.
        runs: Whether `command` is a command.
    """

    id: str
    title: str
    about: str
    rows: tuple[tuple[str, str, str], ...]
    settings: tuple[str, ...]
    scores: tuple[tuple[str, ...], ...]
    costs: tuple[Fact, ...]
    origin: tuple[Fact, ...]
    needs: tuple[str, ...]
    curve: Markup
    file: str
    command: str
    runs: bool


def collect_run_details(
    records: Sequence[Record], places: Mapping[str, Sequence[tuple[str, str, str]]], way: str, extra: Path | None
) -> Iterator[RunDetails]:
    """Yield the details of every run.

    Args:
        records: Records of the runs.
        places: Table rows of a run, by run id.
        way: Path of the results folder, relative to the page.
        extra: A folder of the user's own configuration.
    """
    commands = write_commands(records, extra)
    for record in records:
        rows = tuple(places.get(record.id, ()))
        request, outcome = record.request, record.outcome
        text, runs = commands[record.id]
        yield RunDetails(
            id=record.id,
            title=make_title(request.method_name, [label for _, _, label in rows]),
            about=f"{', '.join(request.targets)} · seed {request.seed} · {request.backbone} · {outcome.split}",
            rows=rows,
            settings=tuple(f"{name}={format_setting(value)}" for name, value in flatten(record.asked).items()),
            scores=tuple(describe_scores(record)),
            costs=tuple(describe_costs(outcome)),
            origin=tuple(describe_origin(record.origin)),
            needs=record.origin.needs,
            curve=chart_to_svg(chart_run(record)),
            file=f"{way}/records/{record.filename}",
            command=text,
            runs=runs,
        )


def format_setting(value: Any) -> str:
    """Return the value of a setting as text.

    >>> format_setting(["code", "math"]), format_setting(None), format_setting(0.001)
    ('[code,math]', 'null', '0.001')
    """
    if isinstance(value, list):
        return f"[{','.join(map(format_setting, value))}]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if not is_number(value) else f"{value:g}"


def is_number(value: Any) -> bool:
    """Return whether a value is a number. Booleans do not count."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def list_used(tables: Iterable[TableData], records: Sequence[Record]) -> list[Record]:
    """Return the records of some tables, with those of earlier stages, in the given order."""
    by_id = {record.id: record for record in records}
    ids = {run for compiled in tables for line in compiled.lines for run in line.runs.values()}
    wanted = {stage.id for run in ids for stage in add_needed(by_id[run], by_id)}
    return [record for record in records if record.id in wanted]
