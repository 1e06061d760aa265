"""The report as one HTML page: sortable tables, figures, and the details of every run.

The page is a function of the records and the tables' YAML. The file is self-contained.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from mode.artefacts import prune_results as pruning
from mode.bench import records as bench
from mode.charts.maps import split_pages
from mode.core.errors import ConfigError
from mode.core.files import write_atomic
from mode.downstream import mixed_results as mixed
from mode.downstream import results as downstream
from mode.records.collection import COLLECTIONS, Collection, find_collection
from mode.records.metrics import METRICS
from mode.records.record import Record, read_records
from mode.report.charts import chart_curves, chart_gates, chart_to_svg, chart_tradeoff
from mode.report.estimate import compile_in_full
from mode.report.frames import (
    CONTAMINATION_NOTE,
    COST_NOTE,
    FRONTIER_NOTE,
    ROUTING_NOTE,
    make_contamination_frame,
    make_cost_frame,
    make_frame,
    make_frontier_frame,
    make_interval_frame,
    make_published_frame,
    make_routing_frame,
)
from mode.report.run_details import RunDetails, collect_run_details, list_used
from mode.report.text import describe_divergence, write_notes
from mode.report.training_charts import chart_learning
from mode.tables.compile import TableData
from mode.tables.findings import list_findings
from mode.tables.table import file_stem, load_table

PAGE = "report.html"
"""Name of the page's file."""


ASSETS = files("mode.report") / "assets"
"""Folder of the template, the style sheet and the script."""


STRONG = "**{}**"
"""Format of cells beyond noise, in a frame of plain text."""


BACKTICKS = re.compile(r"`([^`]+)`")
"""Code in prose."""


@dataclass(frozen=True)
class Row:
    """A row of a table on the page: its cells, the first of which is a heading, and the link of all cells."""

    cells: tuple[str, ...]
    link: str = ""


@dataclass(frozen=True)
class Grid:
    """A table on the page. Rows are sorted within their group."""

    caption: str
    heads: tuple[str, ...]
    groups: tuple[tuple[Row, ...], ...]


@dataclass(frozen=True)
class Origin:
    """The runs of a row.

    Attributes:
        anchor: Anchor of the row on the page.
        label: Label of the row.
        runs: Seeds and ids of the runs. A difference has the runs of both rows.
        missing: Command that makes the runs, if there is none.
    """

    anchor: str
    label: str
    runs: tuple[tuple[int, str], ...]
    missing: str = ""


def make_grid(caption: str, table: pd.DataFrame, links: Sequence[str] = (), more: Sequence[str] = ()) -> Grid:
    """Return a frame as a table of the page.

    Args:
        caption: Caption of the table.
        table: The frame.
        links: Links of the rows of the first group.
        more: Links of the rows of the second group, which follow the first.
    """
    plain = [tuple(row) for row in table.itertuples(index=False, name=None)]
    every = [*links, *more] or [""] * len(plain)
    rows = [Row((head, *map(embolden, cells)), link) for (head, *cells), link in zip(plain, every, strict=True)]
    cut = len(rows) - len(more) if links else len(rows)
    groups = tuple(tuple(group) for group in (rows[:cut], rows[cut:]) if group)
    return Grid(caption, tuple(map(str, table.columns)), groups)


def describe_origins(anchor: str, name: str, compiled: TableData) -> Iterable[Origin]:
    """Yield the runs of every row, then of every difference."""
    for line in compiled.lines:
        missing = "" if line.runs else f"mode reproduce {name}"
        yield Origin(f"{anchor}--{line.name}", line.label, tuple(line.runs.items()), missing)
    for left, right in compiled.table.differences:
        one, other = compiled.line(left), compiled.line(right)
        both = [seed for seed in one.runs if seed in other.runs]
        runs = tuple((seed, line.runs[seed]) for seed in both for line in (one, other))
        yield Origin(f"{anchor}--{left}--{right}", f"{one.label} − {other.label}", runs)


def make_extras(compiled: TableData, rows: Sequence[str], pairs: Sequence[str]) -> Iterable[tuple[str, Grid]]:
    """Yield the further tables of a table, each with a note."""
    if pairs:
        yield "", make_grid("95 % intervals of the differences over documents", make_interval_frame(compiled), pairs)
    if (frontiers := make_frontier_frame(compiled)) is not None:
        yield FRONTIER_NOTE, make_grid("Frontiers", frontiers)
    yield " ".join([COST_NOTE, *describe_divergence(compiled)]), make_grid("Cost", make_cost_frame(compiled), rows)
    if compiled.contamination:
        yield CONTAMINATION_NOTE, make_grid("Contamination", make_contamination_frame(compiled))
    if (routed := make_routing_frame(compiled)) is not None:
        yield ROUTING_NOTE, make_grid("Routers", routed)
    published = make_published_frame(compiled)
    source = compiled.table.published
    if source is not None and published is not None and len(published):
        yield f"{source.source}. {source.note}", make_grid("Published values", published)


@dataclass(frozen=True)
class Section:
    """A table on the page, with its notes, figures, further tables and runs."""

    anchor: str
    title: str
    grid: Grid
    notes: tuple[str, ...]
    findings: tuple[str, ...]
    figures: tuple[Markup, ...]
    curve: Markup
    gates: tuple[Markup, ...]
    extras: tuple[tuple[str, Grid], ...]
    origins: tuple[Origin, ...]


@dataclass(frozen=True)
class Bench:
    """A benchmark on the page, or a whole collection such as the results of downstream tasks."""

    anchor: str
    title: str
    about: str
    grid: Grid
    file: str


@dataclass(frozen=True)
class Contents:
    """The contents of the page."""

    sections: tuple[Section, ...]
    benches: tuple[Bench, ...]
    collections: tuple[Bench, ...]
    runs: tuple[RunDetails, ...]
    known: frozenset[str] = field(default_factory=frozenset)


def write_page(
    tables: Sequence[tuple[str, Sequence[str]]],
    results: Path,
    out: Path,
    extra: Path | None = None,
    metrics: Sequence[str] = (),
) -> Path:
    """Write the page of some tables.

    Args:
        tables: Names of tables or collections, each with the overrides of its rendering. The page has all runs, or with
            a single name only the runs of this table.
        results: Folder of the records.
        out: Folder of the page.
        extra: A folder of the user's own configuration.
        metrics: Metrics that tables show in place of their own.

    Returns:
        Path of the page.

    Raises:
        ConfigError: There is no record of any of the tables.
    """
    text = render_page(collect_contents(tables, results, os.path.relpath(results, out), extra, metrics))
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / PAGE, text.encode())
    return out / PAGE


def collect_contents(
    tables: Sequence[tuple[str, Sequence[str]]],
    results: Path,
    way: str,
    extra: Path | None = None,
    metrics: Sequence[str] = (),
) -> Contents:
    """Return the contents of the page.

    Args:
        tables: As for `write_page`.
        results: Folder of the records.
        way: Path of `results`, relative to the page.
        extra: A folder of the user's own configuration.
        metrics: As for `write_page`.

    Raises:
        ConfigError: There is no record of any of the tables.
    """
    records = read_records(results)
    names = dict.fromkeys(name for name, _ in tables)
    compiled = [
        (file_stem(name, overrides, load_table(name, extra).overrides), name, found)
        for name, overrides in tables
        if name not in COLLECTIONS
        and (found := compile_section(name, records, overrides, extra, metrics, alone=len(tables) == 1)) is not None
    ]
    benches = (
        tuple(make_bench_section(each, way) for each in bench.COLLECTION.read(results))
        if bench.COLLECTION.name in names
        else ()
    )
    collections = tuple(made for name in names if (made := make_collection_section(name, results, way)) is not None)
    if not compiled and not benches and not collections:
        name = next(iter(names))
        makes = find_collection(name).make if name in COLLECTIONS else f"mode reproduce {name}"
        raise ConfigError(f"no record of {name} in {results}: `{makes}` makes them")
    if len(names) == 1:
        records = list_used([each for _, _, each in compiled], records)
    by_id = {record.id: record for record in records}
    sections = tuple(
        make_section(anchor, name, each, by_id) for anchor, name, each in sorted(compiled, key=order_tables)
    )
    return Contents(
        sections,
        benches,
        collections,
        tuple(collect_run_details(records, list_places(sections), way, extra)),
        frozenset(by_id),
    )


def compile_section(
    name: str,
    records: Sequence[Record],
    overrides: Sequence[str],
    extra: Path | None,
    metrics: Sequence[str],
    *,
    alone: bool,
) -> TableData | None:
    """Return a compiled table; None without records, or if the record of an earlier stage is missing.

    Raises:
        ConfigError: The record of an earlier stage is missing, and the table is the only one (`alone`).
    """
    try:
        compiled = compile_in_full(load_table(name, extra, metrics), records, overrides, extra)
    except ConfigError:
        if alone:
            raise
        return None
    return compiled if compiled.says_something else None


def order_tables(item: tuple[str, str, TableData]) -> tuple[bool, bool, bool, bool, str]:
    """Return the sort key of a table.

    Results come before choices of settings, tables before curves, complete tables before incomplete ones, and numbered
    tables before others.
    """
    anchor, _, compiled = item
    return (
        compiled.table.choose,
        bool(compiled.table.curves),
        not all(line.runs for line in compiled.lines),
        not anchor.startswith("table"),
        anchor,
    )


def list_places(sections: Iterable[Section]) -> dict[str, list[tuple[str, str, str]]]:
    """Return the rows of every run, by run id: anchor, title of the table, and label. Differences are left out."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for each in sections:
        for origin in each.origins[: len(each.grid.groups[0])]:
            for _, run in origin.runs:
                found.setdefault(run, []).append((origin.anchor, each.title, origin.label))
    return found


def make_section(anchor: str, name: str, compiled: TableData, records: Mapping[str, Record]) -> Section:
    """Return the section of one table."""
    lines, pairs = compiled.lines, compiled.table.differences
    row_links = [f"#{anchor}--{line.name}" for line in lines]
    pair_links = [f"#{anchor}--{left}--{right}" for left, right in pairs]
    charts = [chart_curves(compiled)] if compiled.table.curves else []
    gates = None if compiled.table.choose else chart_gates(compiled)
    usual, *others = write_notes(compiled)
    return Section(
        anchor=anchor,
        title=compiled.table.title,
        grid=make_grid(compiled.table.title, make_frame(compiled, strong=STRONG), row_links, pair_links),
        notes=(usual, *(text for text in others if text)),
        findings=tuple(list_findings(compiled)),
        figures=tuple(map(chart_to_svg, [*charts, chart_tradeoff(compiled)])),
        curve=chart_to_svg(chart_learning(compiled, records)),
        gates=tuple(map(chart_to_svg, split_pages(gates) if gates else [])),
        extras=tuple(make_extras(compiled, row_links, pair_links)),
        origins=tuple(describe_origins(anchor, name, compiled)),
    )


def embolden(text: str) -> str:
    """Return a cell; in bold if it is marked with asterisks.

    >>> embolden("1.00"), embolden("**1.00**")
    ('1.00', Markup('<strong>1.00</strong>'))
    """
    inner = text.removeprefix("**").removesuffix("**")
    return text if inner == text else Markup("<strong>{}</strong>").format(inner)


def make_bench_section(benchmark: bench.Benchmark, way: str) -> Bench:
    """Return the section of one benchmark."""
    heads, *rows = bench.make_cells(benchmark)
    table = pd.DataFrame(rows, columns=list(heads))
    file = f"{way}/{bench.COLLECTION.name}/{benchmark.filename}"
    return Bench(
        f"bench-{benchmark.id}",
        benchmark.title,
        bench.describe_conditions(benchmark),
        make_grid(benchmark.title, table),
        file,
    )


SECTIONS: tuple[tuple[Collection[Any], str, str, Callable[..., pd.DataFrame]], ...] = (
    (downstream.COLLECTION, "Downstream tasks", downstream.INTRO, downstream.make_frame),
    (mixed.COLLECTION, "Rows in which the domain changes", mixed.INTRODUCTION, mixed.make_frame),
    (pruning.COLLECTION, "Pruning", pruning.INTRODUCTION, pruning.make_frame),
)
"""Collections with one table each: their titles, introductions and tables. Benchmarks have a table per measurement."""


def make_collection_section(name: str, results: Path, way: str) -> Bench | None:
    """Return the section of a collection with one table; None for other names, or without results."""
    for collection, title, about, make in SECTIONS:
        if name == collection.name and (found := collection.read(results)):
            return Bench(name, title, about, make_grid(title, make(found)), f"{way}/{name}.md")
    return None


def render_prose(text: str) -> Markup:
    """Return prose as HTML, with text in backticks as code.

    >>> render_prose("`mode report` & co")
    Markup('<code>mode report</code> &amp; co')
    """
    return Markup(BACKTICKS.sub(r"<code>\1</code>", str(escape(text))))


def render_page(shown: Contents) -> str:
    """Return the page as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = render_prose
    template = environment.from_string((ASSETS / "page.html.j2").read_text("utf-8"))
    style, script = ((ASSETS / name).read_text("utf-8") for name in ("page.css", "page.js"))
    return template.render(
        page=shown,
        metrics=METRICS.values(),
        style=Markup(style),
        script=Markup(script),
        introduction=bench.INTRODUCTION,
    )
