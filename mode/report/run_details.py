"""What a page says of one run: settings, scores, cost, origin, curves, its record and the command that makes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mode.config.check import flatten
from mode.records.command import write_commands
from mode.records.record import Record
from mode.report.charts import chart_run, chart_to_svg

Fact = tuple[str, str]
"""A name and what is known under it."""


def describe_costs(happened: Mapping[str, Any]) -> Iterator[Fact]:
    """Write what a run's own stage took; records of earlier versions do not say all of it."""
    sizes = happened["parameters"]
    for name, value, form in (
        ("Steps", happened["steps"], ","),
        ("Tokens", happened["tokens"], ","),
        ("Seconds", happened["seconds"], ",.1f"),
        ("Tokens/s", happened.get("tokens_per_second"), ",.0f"),
        ("Peak learning rate", happened.get("lr"), "g"),
        ("Parameters", sizes.get("total"), ","),
        ("Trained parameters", sizes.get("trainable"), ","),
        ("Added parameters", sizes.get("added"), ","),
        ("Operations", happened.get("flops"), ".4g"),
        ("Peak memory (bytes)", happened.get("peak_memory_bytes"), ","),
        ("Kept on disk (bytes)", happened.get("kept_bytes"), ","),
        ("Scoring seconds", happened.get("evaluation_seconds"), ",.1f"),
    ):
        if value is not None:
            yield name, format(value, form)


def describe_scores(record: Record) -> Iterator[tuple[str, ...]]:
    """Write what a run scored, by domain."""
    for name, score in record.happened["scores"].items():
        error = score.get("stderr")
        accuracy = f"{100 * score['accuracy']:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
        rest = [("loss", ".3f"), ("bits_per_byte", ".3f"), ("tokens", ",")]
        cells = (format(score[key], form) if key in score else "–" for key, form in rest)
        yield name, "target" if name in record.asked["targets"] else "retention", accuracy, *cells


def make_title(method: str, labels: Sequence[str]) -> str:
    """Return what to call a run: a row's label that stands by itself, or the method with what is known besides.

    >>> make_title("MoDE", ["... B 2", "MoDE, B 2"]), make_title("MoDE", ["... B 2"]), make_title("MoDE", [])
    ('MoDE, B 2', 'MoDE ... B 2', 'MoDE')
    """
    whole = [label for label in labels if not label.startswith("...")]
    return next(iter(whole), " ".join([method, *labels[:1]]))


def describe_origin(provenance: Mapping[str, Any]) -> Iterator[Fact]:
    """Write under what code, versions, machine and data a run was made."""
    commit = provenance.get("commit")
    if commit is not None:
        yield "Commit", f"{commit}{' with changes' if provenance.get('dirty') else ''}"
    if "date" in provenance:
        yield "Date", provenance["date"]
    machine = provenance.get("machine", {})
    if machine:
        yield "Machine", ", ".join(f"{name} {value}" for name, value in machine.items())
    for name in ("threads", "precision"):
        if name in provenance:
            yield name.capitalize(), str(provenance[name])
    if versions := provenance.get("versions"):
        yield "Versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    yield "Backbone", provenance["backbone"]
    yield "Data", ", ".join(f"{name} {value}" for name, value in provenance["data"].items())


@dataclass(frozen=True)
class RunDetails:
    """Everything about a run.

    Attributes:
        id: Its id.
        title: Method, or the row of a table that it is part of.
        about: Targets, seed, backbone and split, in a line.
        rows: Rows that it is part of: anchor, table and label.
        settings: What was asked, as `key=value`.
        scores: By domain: name, target or retention, accuracy and its error in per cent, loss, bits per byte, tokens.
        costs: What training and scoring took.
        origin: Commit, versions, machine, date and fingerprints.
        needs: Ids of the runs that it stands on.
        curve: Drawing of its training; empty where nothing was trained.
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
    curve: Markup
    file: str
    command: str
    runs: bool


def collect_run_details(
    records: Sequence[Record], places: Mapping[str, Sequence[tuple[str, str, str]]], way: str, extra: Path | None
) -> Iterator[RunDetails]:
    """Tell what is known of every run.

    Args:
        records: Their records.
        places: By run id, the rows that it is part of.
        way: Path from the page to the folder of results.
        extra: A folder of the user's own configuration.
    """
    told = write_commands(records, extra)
    for record in records:
        rows = tuple(places.get(record.id, ()))
        method = record.asked["method"]["_target_"].rpartition(".")[2]
        targets = ", ".join(record.asked["targets"])
        text, runs = told[record.id]
        yield RunDetails(
            id=record.id,
            title=make_title(method, [label for _, _, label in rows]),
            about=f"{targets} · seed {record.seed} · {record.asked['backbone']['name']} · {record.happened['split']}",
            rows=rows,
            settings=tuple(f"{name}={format_setting(value)}" for name, value in flatten(record.asked).items()),
            scores=tuple(describe_scores(record)),
            costs=tuple(describe_costs(record.happened)),
            origin=tuple(describe_origin(record.provenance)),
            needs=tuple(record.provenance["needs"]),
            curve=chart_to_svg(chart_run(record)),
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
