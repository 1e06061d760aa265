"""Numbers that prose quotes from tables: each has the address of its cell in a comment, and follows the table.

A quote is a number and `<!-- TABLE/ROW/COLUMN -->`, such as `81.00<!-- table1_long/btm-data/math -->`: a cell of
`results/table1_long.csv`. The number keeps the decimals of the text, and its sign if the text has one; without a sign
it is a size.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from mode.core.errors import ConfigError, suggest
from mode.core.files import write_atomic

QUOTE = re.compile(
    r"(?P<number>[+−-]?[\d,]*\d(?:\.\d+)?)(?P<unit>\**)<!-- (?P<table>[\w.-]+)/(?P<row>[^/>]+)/(?P<column>[\w/.-]+) -->"
)
"""A quote: a number, the end of bold text, and the address of a cell."""


def update_quotes(pages: Iterable[Path], results: Path) -> list[Path]:
    """Write every quoted number as its table has it; return the pages that have changed.

    Raises:
        ConfigError: A quote names a table, row or column that is not there.
    """
    changed = []
    for page, text in render_pages(pages, results).items():
        if text != page.read_text("utf-8"):
            write_atomic(page, text.encode())
            changed.append(page)
    return changed


def find_stale_quotes(pages: Iterable[Path], results: Path) -> list[str]:
    """Return, for every quoted number that differs from its table, where it is and what the table has.

    Raises:
        ConfigError: A quote names a table, row or column that is not there.
    """
    stale = []
    for page, text in render_pages(pages, results).items():
        lines = zip(page.read_text("utf-8").splitlines(), text.splitlines(), strict=True)
        for number, (found, expected) in enumerate(lines, 1):
            pairs = zip(QUOTE.finditer(found), QUOTE.finditer(expected), strict=True)
            stale += [
                f"{page}:{number}: {one['number']} is {other['number']} in {one['table']} (row {one['row']})"
                for one, other in pairs
                if one["number"] != other["number"]
            ]
    return stale


def render_pages(pages: Iterable[Path], results: Path) -> dict[Path, str]:
    """Return the text of every page with its quotes as the tables have them."""
    read = cache(lambda table: read_cells(results / f"{table}.csv"))

    def render(found: re.Match[str]) -> str:
        value = find_cell(read(found["table"]), found["row"], found["column"])
        return f"{format_like(found['number'], value)}{found[0].removeprefix(found['number'])}"

    rendered = {}
    for page in pages:
        try:
            rendered[page] = QUOTE.sub(render, page.read_text("utf-8"))
        except ConfigError as error:
            raise ConfigError(f"{page}: a quote of a table: {error}") from error
    return rendered


def read_cells(path: Path) -> dict[tuple[str, str], float]:
    """Return the means of a table's CSV by row and column.

    Raises:
        ConfigError: There is no such file.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such table")
    with path.open(encoding="utf-8", newline="") as file:
        return {(line["row"], line["column"]): float(line["mean"]) for line in csv.DictReader(file)}


def find_cell(cells: Mapping[tuple[str, str], float], row: str, column: str) -> float:
    """Return the mean of a cell.

    Raises:
        ConfigError: There is no such row or column.
    """
    for place, name in enumerate((row, column)):
        known = sorted({key[place] for key in cells if place == 0 or key[0] == row})
        if name not in known:
            raise ConfigError(f"{name}: no such {('row', 'column')[place]}{suggest(name, known)}")
    return cells[row, column]


def format_like(text: str, value: float) -> str:
    """Return a value with the decimals, the sign and the separators of a number in text.

    >>> format_like("81.00", 80.987), format_like("−1.0", -2.26), format_like("2.2", -2.26), format_like("1,213", 999.6)
    ('80.99', '−2.3', '2.3', '1,000')
    """
    decimals = len(text.partition(".")[2])
    signed, minus = text[0] in "+−-", "−" if text[0] == "−" else "-"
    body = f"{abs(value):,.{decimals}f}"
    body = body if "," in text else body.replace(",", "")
    if not signed:
        return body
    return f"{minus if value < 0.0 else '+'}{body}"
