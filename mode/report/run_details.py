"""What a page says of one run: settings, scores, cost, origin, curves, its record and the command that makes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mode.config.check import flatten
from mode.records.command import write_commands
from mode.records.contents import Outcome, Point, Provenance
from mode.records.metrics import METRICS, Metric
from mode.records.record import Record
from mode.records.score import Score
from mode.report import svg

Fact = tuple[str, str]
"""A name and what is known under it."""


VALIDATION = "validation/"
"""Beginning of what a point of a curve says of validation: validation/DOMAIN/loss, for one."""


def describe_costs(outcome: Outcome) -> Iterator[Fact]:
    """Write what a run's own stage took; earlier records do not say all of it."""
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
    """Write what a run scored, by domain: every metric, and the tokens."""
    for name, score in record.outcome.scores.items():
        kind = "target" if name in record.request.targets else "retention"
        yield name, kind, *(format_metric(score, metric) for metric in METRICS.values()), f"{score.tokens:,}"


def format_metric(score: Score, metric: Metric) -> str:
    """Write a metric with its standard error, or a dash where the record does not hold the metric."""
    value, error = score.find(metric), score.find_error(metric)
    if value is None:
        return "–"
    return metric.format(value) + ("" if error is None else f" ± {metric.format(error)}")


def make_title(method: str, labels: Sequence[str]) -> str:
    """Return what to call a run: a row's label that stands by itself, or the method with what is known besides.

    >>> make_title("MoDE", ["... B 2", "MoDE, B 2"]), make_title("MoDE", ["... B 2"]), make_title("MoDE", [])
    ('MoDE, B 2', 'MoDE ... B 2', 'MoDE')
    """
    whole = [label for label in labels if not label.startswith("...")]
    return next(iter(whole), " ".join([method, *labels[:1]]))


def describe_origin(origin: Provenance) -> Iterator[Fact]:
    """Write under what code, versions, machine and data a run was made."""
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


def draw_curves(record: Record) -> Iterator[Markup]:
    """Draw the loss and the accuracy of training, with those on the validation split where they were measured."""
    curve = record.outcome.curve
    for key, up in (("loss", "Loss (nats per token)"), ("accuracy", "Accuracy (%)")):
        series = [svg.Series("training", average_curve([curve], key), marked=False)]
        ends = dict.fromkeys(name for point in curve for name in point.values if name.startswith(VALIDATION))
        for name in [name for name in ends if name.endswith(f"/{key}")]:
            label = name.removeprefix(VALIDATION).removesuffix(f"/{key}")
            series.append(svg.Series(f"validation, {label}", average_curve([curve], name)))
        if drawing := svg.draw_lines(f"Training {key} of run {record.id}", series, "Steps", up):
            yield drawing


@dataclass(frozen=True)
class RunDetails:
    """Everything about a run.

    Attributes:
        id: Its id.
        title: Method, or the row of a table that it is part of.
        about: Targets, seed, backbone and split, in a line.
        rows: Rows that it is part of: anchor, table and label.
        settings: What was asked, as `key=value`.
        scores: By domain: name, target or retention, every metric with its standard error, tokens.
        costs: What training and scoring took.
        origin: Commit, versions, machine, date and fingerprints.
        needs: Ids of the runs that it stands on.
        curves: Drawings of its training; none where nothing was trained.
        file: Path of its record from the page.
        command: What makes it, or why no command does.
        runs: Whether `command` is one.
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
    curves: tuple[Markup, ...]
    file: str
    command: str
    runs: bool


def collect_run_details(
    records: Sequence[Record], places: Mapping[str, Sequence[tuple[str, str, str]]], way: str, extra: Path | None
) -> Iterator[RunDetails]:
    """Collect what is known of every run.

    Args:
        records: Their records.
        places: By run id, the rows that it is part of.
        way: Path from the page to the folder of results.
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
            curves=tuple(draw_curves(record)),
            file=f"{way}/records/{record.filename}",
            command=text,
            runs=runs,
        )


def format_setting(value: Any) -> str:
    """Write a setting.

    >>> format_setting(["code", "math"]), format_setting(None), format_setting(0.001)
    ('[code,math]', 'null', '0.001')
    """
    if isinstance(value, list):
        return f"[{','.join(map(format_setting, value))}]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if not is_number(value) else f"{value:g}"


def is_number(value: Any) -> bool:
    """Say whether a value is a number, which truth values are not here."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def average_curve(curves: Sequence[Sequence[Point]], key: str) -> list[tuple[float, float, float]]:
    """Return a quantity over steps as the mean of several curves, at the steps that all have; accuracy in per cent.

    >>> average_curve([[Point(1, {"loss": 2.0})], [Point(1, {"loss": 4.0}), Point(2, {"loss": 1.0})]], "loss")
    [(1.0, 3.0, 0.0)]
    """
    factor = 100.0 if key.endswith("accuracy") else 1.0
    found = [{point.step: point.values[key] for point in curve if key in point.values} for curve in curves]
    shared = [step for step in found[0] if all(step in each for each in found)] if found else []
    return [(float(step), factor * sum(each[step] for each in found) / len(found), 0.0) for step in shared]
