"""Render the tables of a results folder, and check the committed tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mode.core.errors import ConfigError, NothingError
from mode.core.files import find_paths, read_existing, write_atomic
from mode.records.record import read_records
from mode.report.estimate import compile_in_full
from mode.report.text import render_csv, render_latex, render_markdown
from mode.tables.compile import TableData
from mode.tables.table import file_stem, load_table


def is_drawn(figure: Path, rendered: Mapping[Path, str], records: Path) -> bool:
    """Return whether a table is up to date: its files have the same text, and its figure is newer than all records.

    Args:
        figure: Path of the figure.
        rendered: Text of every file, by path.
        records: Folder of the records.
    """
    same = read_existing(rendered, lambda path: path.read_text("utf-8")) == list(rendered.values())
    drawn = read_existing([figure], read_time)
    return same and bool(drawn) and drawn > [max(read_existing(find_paths(records, "*.json"), read_time), default=0)]


def read_time(path: Path) -> int:
    """Return the modification time of a file in nanoseconds."""
    return path.stat().st_mtime_ns


def render_table(compiled: TableData) -> dict[str, str]:
    """Return a compiled table as text, by file suffix: md, tex, csv."""
    return {"md": render_markdown(compiled), "tex": render_latex(compiled), "csv": render_csv(compiled)}


def report(
    name: str,
    results: Path,
    overrides: Sequence[str] = (),
    extra: Path | None = None,
    *,
    write: bool | None = True,
    metrics: Sequence[str] = (),
) -> tuple[str, Path]:
    """Render a table from the records of a results folder, and write the table and its figures into the folder.

    With chosen metrics, the table has a file of its own and no figure, because figures show the accuracy.

    Args:
        name: Name of the table.
        results: Folder of the results.
        overrides: The user's overrides.
        extra: A folder of the user's own configuration.
        write: True writes the files, False writes none, and None writes them unless they are up to date.
        metrics: Metrics to show in place of the table's own.

    Returns:
        The table in Markdown, and the path of its file.

    Raises:
        ConfigError: The file of a record is damaged.
        NothingError: No record belongs to the table.
    """
    table = load_table(name, extra, metrics)
    compiled = compile_in_full(table, read_records(results), overrides, extra)
    if not compiled.says_something:
        raise NothingError(f"no record of {name} in {results / 'records'}: make them with `mode reproduce {name}`")
    base = results / file_stem(name, overrides, table.overrides, metrics)
    rendered = {base.with_suffix(f".{suffix}"): text for suffix, text in render_table(compiled).items()}
    figure = base.with_suffix(".md" if metrics else ".png")
    if write is False or (write is None and is_drawn(figure, rendered, results / "records")):
        return render_markdown(compiled), base.with_suffix(".md")
    for path, text in rendered.items():
        write_atomic(path, text.encode())
    if metrics:
        return render_markdown(compiled), base.with_suffix(".md")
    draw_figures(compiled, base)
    return render_markdown(compiled), base.with_suffix(".md")


def draw_figures(compiled: TableData, base: Path) -> None:
    """Draw the figures of a table: its chart, and pages of gate weights."""
    from mode.charts.draw import write_chart
    from mode.charts.maps import split_pages
    from mode.report.charts import chart_gates, chart_table

    write_chart(chart_table(compiled), base.with_suffix(".png"))
    gates = None if compiled.table.choose else chart_gates(compiled)
    pages = split_pages(gates) if gates else []
    numbers = ["", *(f"-{number}" for number in range(2, len(pages) + 1))][: len(pages)]
    drawn = [base.with_name(f"{base.name}-gates{number}.png") for number in numbers]
    for page, path in zip(pages, drawn, strict=True):
        write_chart(page, path)
    for path in set(list_gates(base)) - set(drawn):
        path.unlink(missing_ok=True)


def list_gates(base: Path) -> list[Path]:
    """Return the paths of the existing pages of a table's gate weights, in order."""
    first = base.with_name(f"{base.name}-gates.png")
    others = sorted(base.parent.glob(f"{base.name}-gates-[0-9]*.png"))
    return [path for path in (first, *others) if path.exists()]


def check_tables(
    results: Path, names: Sequence[str], extra: Path | None = None, *, complete: bool = True
) -> list[Path]:
    """Return the paths of table files that differ from a new rendering of the records.

    Args:
        results: Folder of the results.
        names: Names of the tables.
        extra: A folder of the user's own configuration.
        complete: Whether a table with records must have been rendered.

    Raises:
        ConfigError: There is no record.
    """
    records = read_records(results)
    if not records:
        raise ConfigError(f"no record in {results / 'records'}, so there is no table to check")
    stale: list[Path] = []
    for name in names:
        table = load_table(name, extra)
        for overrides in table.variants:
            base = results / file_stem(name, overrides, table.overrides)
            paths = {suffix: base.with_suffix(f".{suffix}") for suffix in ("md", "tex", "csv")}
            if not complete and not any(path.exists() for path in paths.values()):
                continue
            compiled = compile_in_full(table, records, overrides, extra)
            expected = render_table(compiled) if compiled.says_something else {}
            for suffix, path in paths.items():
                found = path.read_text("utf-8") if path.exists() else None
                if found != expected.get(suffix):
                    stale.append(path)
    return stale
