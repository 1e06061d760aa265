"""Sentences about a table follow from its numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from mode.charts.draw import write_chart
from mode.report.charts import chart_curves
from mode.report.text import render_markdown
from mode.tables.compile import RowResult, TableData
from mode.tables.findings import find_crossings, list_findings
from mode.tables.table import Claim, Curves, Row, Table, load_table, select_rows
from tests.report.test_report import parsed
from tests.support.refusals import refused
from tests.tables.test_statistics import line

X = (10, 100, 1000)
GAPS = (-2.0, 2.0, 4.0)
LINES = {"MoDE": tuple(f"mode@n{x}" for x in X), "LoRA": tuple(f"lora@n{x}" for x in X)}
CLAIM = Claim(text="MoDE is ahead.", ours="mode@n1000", theirs="lora@n1000", column="code")


def row(name: str, qualities: list[float], spread: float = 0.0, **cost: float) -> RowResult:
    return dataclasses.replace(line(qualities, spread), name=name, label=name.upper(), cost={"n": 3, **cost})


def compiled(lines: list[RowResult], **settings: Any) -> TableData:
    rows = tuple(Row(name=each.name, label=each.label, overrides=()) for each in lines)
    table = Table(title="T", rows=rows, **settings)
    return TableData(
        table=table, lines=tuple(lines), domains=("code",), targets=("code",), split="test", left_out=0, overlap=()
    )


def curves(spread: float = 0.0) -> TableData:
    lines = [row(f"lora@n{x}", [50.0, 50.1, 49.9], examples=x) for x in X]
    lines += [
        row(f"mode@n{x}", [50.0 + gap, 50.1 + gap, 49.9 + gap], spread, examples=x)
        for x, gap in zip(X, GAPS, strict=True)
    ]
    panel = Curves(title="Rows", x="examples", column="code", lines=LINES)
    return compiled(lines, curves=(panel,), claims=(CLAIM,))


def test_curves_are_compared_point_by_point_and_cross_where_the_sign_changes() -> None:
    claim, crossing = list_findings(curves())
    assert crossing.startswith("Rows: MoDE − LoRA on Code: -2.00 at 10, +2.00 at 100, +4.00 at 1000; ")
    assert crossing.endswith("they cross at about 31.6.")
    assert claim == (
        "Published: MoDE is ahead. Here: MODE@N1000 − LORA@N1000 on Code +4.00 (+4.00 to +4.00, n 3): it holds here."
    )


def test_noise_is_called_noise() -> None:
    claim, crossing = list_findings(curves(spread=3.0))
    assert "-2.00 at 10 (noise), +2.00 at 100 (noise), +4.00 at 1000; no crossing is beyond noise." in crossing
    assert "it holds here" in claim
    assert "not told from noise" in list_findings(curves(spread=9.0))[0]


def test_the_opposite_is_told() -> None:
    given = curves()
    table = dataclasses.replace(given.table, claims=(dataclasses.replace(CLAIM, ours=CLAIM.theirs, theirs=CLAIM.ours),))
    assert "the opposite holds here" in list_findings(dataclasses.replace(given, table=table))[0]


def test_rows_without_records_are_passed_over() -> None:
    given = curves()
    empty = [dataclasses.replace(each, quality={}, resampled={}, cost={"n": 0}) for each in given.lines]
    assert list_findings(dataclasses.replace(given, lines=tuple(empty))) == []
    some = [
        each if "10" not in each.name.split("@n")[1:] else gone for each, gone in zip(given.lines, empty, strict=True)
    ]
    assert len(list_findings(dataclasses.replace(given, lines=tuple(some)))) == 2


def test_a_cost_over_the_number_of_domains_is_drawn_without_a_sentence() -> None:
    lines = [row(f"{name}@{x}", [50.0], domains=x, total=x * 2.5) for name in ("mode", "lora") for x in (1, 2, 3)]
    names = {"MoDE": ("mode@1", "mode@2", "mode@3"), "LoRA": ("lora@1", "lora@2", "lora@3")}
    sizes = Curves(title="Size", x="domains", column="total", lines=names)
    gates = dataclasses.replace(sizes, column="own")  # which no row has
    given = compiled(lines, curves=(sizes, gates))
    assert list_findings(given) == []
    (size,) = chart_curves(given).panels
    assert [[(point.x, point.y) for point in each.points] for each in size.series] == [
        [(1, 2.5), (2, 5.0), (3, 7.5)]
    ] * 2
    assert (size.x.base, size.x.ticks) == (0, [1, 2, 3])


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([(1, 1.0), (10, 2.0)], []),
        ([(1, 1.0), (100, -1.0)], [10.0]),
        ([(1, 1.0), (100, -1.0), (10000, 1.0)], [10.0, 1000.0]),
        ([(1, 0.0), (10, 1.0)], []),
    ],
)
def test_crossings_lie_between_neighbours(gaps: list[tuple[float, float]], expected: list[float]) -> None:
    assert find_crossings(gaps) == pytest.approx(expected)


@pytest.mark.slow
def test_the_sentences_stand_in_the_table_and_the_panels_are_drawn(tmp_path: Path) -> None:
    given = curves()
    given = dataclasses.replace(given, lines=(*given.lines, row("sft", [52.0, 52.1, 51.9], added=0.0)))
    level = Curves(title="Added", x="added", column="code", lines={"SFT": ("sft",), "LoRA": ()})
    rows = (*given.table.rows, Row(name="sft", label="SFT", overrides=()))
    given = dataclasses.replace(
        given, table=dataclasses.replace(given.table, rows=rows, curves=(*given.table.curves, level))
    )
    text = render_markdown(given)
    sentences = list_findings(given)
    assert sentences
    assert all(f"- {sentence}" in text for sentence in sentences)
    write_chart(chart_curves(given), tmp_path / "curves.png")
    first = (tmp_path / "curves.png").read_bytes()
    write_chart(chart_curves(given), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == first


def test_relative_cells_are_differences_to_the_backbone() -> None:
    lines = [row("backbone", [40.0, 40.0, 40.0]), row("sft", [50.0, 50.1, 49.9]), row("lora", [40.0, 40.1, 39.9], 3.0)]
    text = render_markdown(compiled(lines, relative=True))
    cells = {label: row["Code"] for label, row in parsed(text).items()}
    assert cells["BACKBONE"] == "40.00 ± 0.00"
    assert cells["SFT"] == "**+10.00 ± 0.10**"
    assert cells["LORA"] == "+0.00 ± 0.10"
    assert "points gained or lost against the untouched backbone" in text


def test_a_table_with_some_of_its_rows_keeps_what_is_about_those() -> None:
    table = curves().table
    shorter = select_rows(table, [name for name in (each.name for each in table.rows) if name != "mode@n1000"])
    assert shorter.claims == ()
    assert shorter.curves[0].lines == {"MoDE": LINES["MoDE"][:2], "LoRA": LINES["LoRA"]}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"claims": [{"text": "", "ours": "sft", "theirs": "lora", "column": "code"}]}, ("claims", "row lora")),
        (
            {"curves": [{"title": "", "x": "added", "column": "code", "lines": {"LoRA": ["lora"]}}]},
            ("curves", "row lora"),
        ),
        ({"relative": True}, ("relative", "backbone")),
        ({"curves": [{"title": "", "x": "depth", "column": "code", "lines": {}}]}, ("table/mine", "added")),
        ({"curves": [{"title": "", "x": "added", "column": "cod", "lines": {}}]}, ("column cod", "code?")),
    ],
)
def test_a_table_that_speaks_of_rows_it_does_not_have_is_refused(
    tmp_path: Path, settings: dict[str, Any], named: tuple[str, ...]
) -> None:
    (tmp_path / "table").mkdir()
    plain = {"title": "T", "rows": [{"name": "sft", "label": "SFT", "overrides": ["method=sft"]}]}
    (tmp_path / "table" / "mine.yaml").write_text(yaml.safe_dump(plain | settings), encoding="utf-8")
    with refused(*named):
        load_table("mine", tmp_path)
