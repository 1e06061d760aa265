"""Command `mode report`: render tables, figures and the HTML page from records."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from cli.options import ConfOption, MetricOption, Overrides, complete, reporting_errors
from mode.core.files import expand_home

Rendered = tuple[str, list[str]]
"""Name of a table, and the overrides that it was rendered with."""


PUBLISHED = Path(__file__).parent.parent / "results"
"""Folder of the published results."""


def report(
    table: Annotated[
        str | None,
        typer.Argument(help="Table, or bench, downstream, mixed or pruning.", autocompletion=complete("table")),
    ] = None,
    overrides: Overrides = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fail if a table differs from the one that its records give.")
    ] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Also log the tables to Weights & Biases.")] = False,
    html: Annotated[bool, typer.Option("--html", help="Write tables and runs as one page, report.html.")] = False,
    metric: MetricOption = None,
    conf: ConfOption = None,
) -> None:
    """Render tables and figures from records, by name or all.

    Examples: mode report table1; mode report table1 --metric bits-per-byte; mode report --check; mode report --html
    """
    with reporting_errors():
        from mode.config.compose import parse_overrides
        from mode.config.groups import list_members
        from mode.core.errors import ConfigError, suggest
        from mode.records.collection import COLLECTIONS

        if table is not None and "=" in table:
            overrides, table = [table, *(overrides or [])], None
        metrics = find_metric_names(metric or [], check=check)
        refuse_both({"--check": check, "--wandb": wandb, "--html": html})
        given = list(overrides or [])
        names = [*list_members("table", conf), *COLLECTIONS]
        if table is not None and table not in names:
            raise ConfigError(f"table {table}: not one of {', '.join(names)}{suggest(table, names)}")
        asked = any(item.key == "paths.results" for item in parse_overrides(given))
        results = find_results_folder(given, conf)
        if asked and not html and not results.is_dir():  # --html makes the folder of its page
            raise ConfigError(f"paths.results={results}: no such folder")
        if check:
            own = asked or any((results / "records").glob("*.json"))
            check_published(results if own else PUBLISHED, [table] if table else names, conf)
            return
        folder = table if table in COLLECTIONS else "records"
        published = not any((results / folder).glob("*.json")) and any((PUBLISHED / folder).glob("*.json"))
        if published:
            print(f"no records in {results}; showing the published records", file=sys.stderr)
        chosen = PUBLISHED if published else results
        shown = [table] if table else names
        if html:
            print_page(shown, chosen, results, given, conf, metrics)
            return
        rendered = render_tables(shown, chosen, given, conf, write=not published, metrics=metrics)
        if not published:
            write_quotes(results)
        if wandb:
            publish_tables(rendered, chosen, given, conf, metrics)


def find_metric_names(names: Sequence[str], *, check: bool) -> list[str]:
    """Return the names of metrics, each once.

    Raises:
        ConfigError: There is no metric of a name, or published tables are checked, which have their own.
    """
    from mode.core.errors import ConfigError
    from mode.records.metrics import find_metrics

    if names and check:
        raise ConfigError("--metric: published tables have the metrics of their YAML; not with --check")
    return list(dict.fromkeys(metric.name for metric in find_metrics(names)))


def refuse_both(flags: Mapping[str, bool]) -> None:
    """Refuse more than one of the flags that use the rendered tables in different ways."""
    from mode.core.errors import ConfigError

    given = [name for name, chosen in flags.items() if chosen]
    if len(given) > 1:
        does = {"--check": "compares files", "--wandb": "logs tables", "--html": "writes a page"}
        raise ConfigError(f"{' and '.join(f'{name} {does[name]}' for name in given)}: choose one of the two")


def print_page(
    names: Sequence[str],
    records: Path,
    results: Path,
    given: Sequence[str],
    conf: Path | None,
    metrics: Sequence[str],
) -> None:
    """Write the page of tables into the folder `results`, from the records in `records`, and print its path."""
    from mode.report.page import write_page

    tables = [(name, each) for name in names for each in list_variants(name, given, conf)]
    print(write_page(tables, records, results, conf, metrics))


def publish_tables(
    rendered: Sequence[Rendered], results: Path, given: Sequence[str], conf: Path | None, metrics: Sequence[str]
) -> None:
    """Log rendered tables to Weights & Biases.

    Raises:
        ConfigError: There is no table to log, or tracking is off.
    """
    from mode.config.check import replace_settings
    from mode.config.compose import compose
    from mode.core.errors import ConfigError
    from mode.records.collection import COLLECTIONS
    from mode.report.wandb import publish

    run = compose(given, conf)
    tables = [item for item in rendered if item[0] not in COLLECTIONS]
    if run.track.mode == "none" or not tables:
        raise ConfigError("--wandb with track=none logs nowhere" if tables else "--wandb: no table to log")
    run = replace_settings(run, paths=replace_settings(run.paths, results=str(results)))
    run_id = publish(tables, run, conf, metrics)
    where = "`mode sync` pushes it" if run.track.mode == "offline" else "pushed"
    print(f"logged to Weights & Biases as {run_id}: {where}", file=sys.stderr)


def check_published(results: Path, names: Sequence[str], conf: Path | None) -> None:
    """Compare the files of a results folder with a new rendering of its records.

    Raises:
        ConfigError: A file differs.
    """
    from mode.core.errors import ConfigError
    from mode.records.collection import COLLECTIONS, find_collection
    from mode.report.quotes import find_stale_quotes
    from mode.report.render import check_tables

    tables = [name for name in names if name not in COLLECTIONS]
    complete = len(names) == 1 or is_published(results)
    stale = check_tables(results, tables, conf, complete=complete) if tables else []
    stale += [path for name in names if name in COLLECTIONS for path in find_collection(name).stale(results)]
    if stale:
        raise ConfigError(
            f"{stale[0]} does not follow from the records beside it: run `mode report` to render it again"
        )
    if quotes := find_stale_quotes(list_pages(results), results):
        raise ConfigError(f"{quotes[0]}: run `mode report` to write it again")
    print(f"every {'' if complete else 'rendered '}table in {results} follows from its records")


def list_pages(results: Path) -> list[Path]:
    """Return the pages of the project that quote a folder's tables; none for a folder of the user's own."""
    root = results.parent
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md")), results / "README.md"]
    return [page for page in pages if page.exists()] if is_published(results) else []


def is_published(results: Path) -> bool:
    """Return whether a folder is that of the published results."""
    return PUBLISHED.is_dir() and results.is_dir() and results.samefile(PUBLISHED)


def render_tables(
    names: Sequence[str],
    results: Path,
    given: Sequence[str],
    conf: Path | None,
    *,
    write: bool,
    metrics: Sequence[str] = (),
) -> list[Rendered]:
    """Render every table that has records, with each of its variants.

    Raises:
        NothingError: No table has records.
    """
    from mode.core.errors import NothingError
    from mode.records.collection import COLLECTIONS, find_collection
    from mode.report.render import report as render_report

    rendered: list[Rendered] = []
    for name in names:
        variants = list_variants(name, given, conf)
        for each in variants:
            try:
                if name in COLLECTIONS:
                    text, path = find_collection(name).report(results, write=write)
                else:
                    text, path = render_report(name, results, each, conf, write=write, metrics=metrics)
            except NothingError:
                if len(names) == len(variants) == 1:
                    raise
                continue
            print(text)
            if write:
                print(f"written to {path}", file=sys.stderr)
            rendered.append((name, each))
    if not rendered:
        raise NothingError(f"no record of {names[0]} in {results / 'records'}: `mode reproduce {names[0]}` makes them")
    return rendered


def list_variants(table: str, given: Sequence[str], conf: Path | None) -> list[list[str]]:
    """Return the overrides of every variant of a table; only the given ones if they choose an experiment or budget."""
    from mode.config.compose import parse_overrides
    from mode.records.collection import COLLECTIONS
    from mode.tables.table import load_table

    if table in COLLECTIONS or any(item.key in ("experiment", "budget") for item in parse_overrides(given)):
        return [list(given)]
    return [[*variant, *given] for variant in load_table(table, conf).variants]


def write_quotes(results: Path) -> None:
    """Write the numbers that the project's pages quote from a folder's tables."""
    from mode.report.quotes import update_quotes

    for page in update_quotes(list_pages(results), results):
        print(f"written to {page}", file=sys.stderr)


def find_results_folder(overrides: Sequence[str], conf: Path | None) -> Path:
    """Return the folder of results of the configuration."""
    from mode.config.compose import compose

    return expand_home(compose(overrides, conf).paths.results)
