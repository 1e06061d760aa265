"""Charts of the published records: readable, with one style for a method, and the same on the page as in a PNG."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest

from mode.bench.figures import chart_layouts, chart_scale
from mode.bench.records import COLLECTION
from mode.charts.chart import MOST_NAMED, Axis, Chart, HeatMaps, Panel, Point, Series, Style, make_styles
from mode.charts.colours import METHODS
from mode.charts.draw import lay_out, render_svg, write_chart
from mode.charts.layout import Layout
from mode.charts.maps import split_pages
from mode.charts.sheet import CLASSES, POINTS, Place, Side, find_colour, measure
from mode.config.groups import list_members
from mode.records.record import Record, read_records
from mode.report.charts import (
    chart_gates,
    chart_table,
    chart_tradeoff,
    find_method,
)
from mode.report.page import ASSETS
from mode.report.plan_figures import chart_plan
from mode.report.training_charts import chart_learning, chart_run
from mode.tables.compile import TableData, compile_table
from mode.tables.table import file_stem, load_table

RESULTS = Path(__file__).parents[2] / "results"
Box = tuple[float, float, float, float]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return read_records(RESULTS)


def compile_published(records: Sequence[Record]) -> Iterator[tuple[str, TableData]]:
    """Compile every published table under every setting that it is published under."""
    for name in list_members("table", None):
        table = load_table(name)
        for overrides in table.variants:
            compiled = compile_table(table, records, overrides, None)
            if compiled.says_something:
                yield file_stem(name, overrides, table.overrides), compiled


@pytest.fixture(scope="module")
def tables(records: list[Record]) -> dict[str, TableData]:
    return dict(compile_published(records))


@pytest.fixture(scope="module")
def charts(tables: dict[str, TableData], records: list[Record]) -> dict[str, Chart | HeatMaps]:
    """Return every chart of the published tables, benchmarks and plans, by name."""
    by_id = {record.id: record for record in records}
    found: dict[str, Chart | HeatMaps | None] = {}
    for stem, compiled in tables.items():
        found |= {stem: chart_table(compiled), f"{stem} trade-off": chart_tradeoff(compiled)}
        found[f"{stem} learning"] = chart_learning(compiled, by_id)
        gates = None if compiled.table.choose else chart_gates(compiled)  # as in `draw_figures`
        pages = split_pages(gates) if gates else []
        found |= {f"{stem} gates {number}": page for number, page in enumerate(pages)}
    for benchmark in COLLECTION.read(RESULTS):
        draw = {"scale": chart_scale, "sharding": chart_layouts}.get(benchmark.asked["suite"])
        if draw:
            found[benchmark.filename] = draw(benchmark.happened["cases"])
    plan = pd.read_csv(RESULTS / "plan.csv")
    for column in ("ms", "holds_gb"):
        found[f"plan {column}"] = chart_plan(plan, column, column, (64, 4096))
    return {name: chart for name, chart in found.items() if chart is not None}


@dataclass
class Recorder:
    """A sheet that remembers where texts and markers are."""

    texts: list[tuple[str, Box]] = field(default_factory=list)
    marks: list[tuple[Place, Style]] = field(default_factory=list)

    def line(self, places: Sequence[Sequence[Place]], colour: str, width: float, dashes: Sequence[float] = ()) -> None:
        assert all(len(each) > 1 for each in places)

    def mark(self, place: Place, style: Style, radius: float, note: str = "") -> None:
        self.marks.append((place, style))

    def box(self, corner: Place, width: float, height: float, colour: str, opacity: float) -> None:
        assert 0.0 <= opacity <= 1.0

    def write(self, place: Place, text: str, size: float, colour: str, side: Side, *, bold: bool, turned: bool) -> None:
        if not text:
            return
        wide, (x, y) = measure(text, size, bold=bold), place
        start = {"left": 0.0, "center": wide / 2.0, "right": wide}[side]
        up, down = 0.72 * size / POINTS, 0.2 * size / POINTS  # capitals and descenders
        box = (x - up, y - start, x + down, y + start) if turned else (x - start, y - up, x - start + wide, y + down)
        self.texts.append((text, box))


@dataclass
class Drawn:
    """A chart, its layout, where its texts and markers are, and its SVG."""

    chart: Chart | HeatMaps
    layout: Layout
    recorder: Recorder
    svg: str


@pytest.fixture(scope="module")
def drawn(charts: dict[str, Chart | HeatMaps]) -> dict[str, Drawn]:
    """Draw every chart once."""
    found = {}
    for name, chart in charts.items():
        layout, recorder = lay_out(chart), Recorder()
        layout.draw(recorder)
        found[name] = Drawn(chart, layout, recorder, render_svg(chart))
    return found


def overlap(one: Box, other: Box) -> bool:
    """Say whether two boxes share more than an edge."""
    wide, high = (min(one[n + 2], other[n + 2]) - max(one[n], other[n]) for n in (0, 1))
    return wide > 0.005 and high > 0.005


@pytest.mark.slow
def test_plots_fill_most_of_the_picture(drawn: dict[str, Drawn]) -> None:
    for name, each in drawn.items():
        chart, layout = each.chart, each.layout
        width, height = layout.size
        assert max(width, height) <= 11.5, name  # inches: nobody reads a longer picture
        filled = sum((right - left) * (low - top) for left, top, right, low in layout.plots)
        least = 0.2  # a heat map of a few cells has a title and the names of its branches beside them
        if isinstance(chart, Chart):
            assert any(panel.series for panel in chart.panels), name
            least = {"points": 0.5, "key": 0.42, "ends": 0.35}[chart.names]
            cells = -(-len(chart.panels) // chart.columns) * chart.columns
            filled *= cells / len(chart.panels)  # a last row may have room left
        assert filled / (width * height) >= least, (name, filled)


@pytest.mark.slow
def test_no_text_lies_over_another_or_outside(drawn: dict[str, Drawn]) -> None:
    for name, each in drawn.items():
        texts = each.recorder.texts
        width, height = each.layout.size
        for text, (left, top, right, low) in texts:
            assert min(left, top, width - right, height - low) >= 0.0, (name, text)
        clashes = [(one, other) for (one, a), (other, b) in combinations(texts, 2) if overlap(a, b)]
        assert clashes == [], name


@pytest.mark.slow
def test_no_name_lies_over_a_named_point_and_no_key_over_any(drawn: dict[str, Drawn]) -> None:
    for name, each in drawn.items():
        chart, recorder, plots = each.chart, each.recorder, each.layout.plots
        if not isinstance(chart, Chart):
            continue
        labels = {series.label for panel in chart.panels for series in panel.series if series.label}
        for text, box in recorder.texts:
            centres = [place for place, style in recorder.marks if style.colour]
            if chart.names == "points" and any(text in label for label in labels):
                covered = [(x, y) for x, y in centres if box[0] < x < box[2] and box[1] < y < box[3]]
                assert covered == [], (name, text)
            elif text in labels:
                assert not any(overlap(box, plot) for plot in plots), (name, text)


@pytest.mark.slow
def test_named_series_differ_in_style_and_are_few(charts: dict[str, Chart | HeatMaps]) -> None:
    for name, chart in charts.items():
        if not isinstance(chart, Chart):
            continue
        for panel in chart.panels:
            named = [series for series in panel.series if series.label]
            assert len(named) <= MOST_NAMED, name
            assert len({series.style for series in named}) == len(named), (name, panel.title)
            assert all(series.style.colour for series in named), name
        if chart.names == "key":
            styles = {(series.label, series.style) for panel in chart.panels for series in panel.series if series.label}
            assert len(styles) == len({label for label, _ in styles}) == len({style for _, style in styles}), name


@pytest.mark.slow
def test_a_method_has_its_colour_and_marker_in_every_chart(
    tables: dict[str, TableData], charts: dict[str, Chart | HeatMaps]
) -> None:
    assert len(set(METHODS.values())) == len(METHODS)
    for stem, compiled in tables.items():
        for row in compiled.table.rows:
            assert find_method(compiled, row.name) in METHODS.values(), (stem, row.name)
    seen = {
        (series.style.colour, series.style.marker)
        for name in tables
        for chart in (charts[name], charts[f"{name} trade-off"])
        if isinstance(chart, Chart)
        for panel in chart.panels
        for series in panel.series
        if series.label
    }
    assert seen <= set(METHODS.values())


@pytest.mark.slow
def test_png_and_page_show_the_same_description(drawn: dict[str, Drawn]) -> None:
    for name, each in drawn.items():
        svg, recorder = each.svg, each.recorder
        written = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg) if text]
        unescaped = [text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for text in written]
        assert unescaped == [text for text, _ in recorder.texts], name
        for style in {style for _, style in recorder.marks}:
            assert f'class="m {CLASSES[find_colour(style)]} ' in svg, name


def test_the_page_defines_every_colour_of_the_charts_as_the_pictures_have_it() -> None:
    style = (ASSETS / "page.css").read_text("utf-8")
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    names = {"paper": "page"}
    for code, given in CLASSES.items():
        variable = names.get(given, given)
        assert f"--{variable}: {code};" in light, given
        assert re.search(rf"--{variable}: #\w{{6}};", dark), given
        assert f".{given} {{ color: var(--{variable}); }}" in style, given


@pytest.mark.slow
def test_an_svg_is_short_and_names_nothing(drawn: dict[str, Drawn], records: list[Record]) -> None:
    for name, each in drawn.items():
        chart, svg = each.chart, each.svg
        most = 120_000
        if isinstance(chart, HeatMaps):  # a rectangle and a value for every cell
            cells = sum(len(row) for each in chart.maps for rows in each.groups.values() for row in rows)
            most = 20_000 + 250 * cells
        assert len(svg) < most, name
        assert not re.search(r'\bid="|url\(|style=', svg), name
    for name in list(drawn)[::10]:
        assert drawn[name].svg == render_svg(drawn[name].chart), name
    runs = [chart for one in records[::10] if (chart := chart_run(one)) is not None]
    assert len(runs) > 50
    assert sum(len(render_svg(chart)) for chart in runs) / len(runs) < 5_000


def test_what_a_label_says_is_never_markup() -> None:
    series = Series("<b>", [Point(1.0, 2.0, note="<i>&")], Style("blue"))
    svg = render_svg(Chart("<u>", [Panel("", Axis("<p>"), Axis("y"), [series])]))
    assert not re.search(r"<[bipu]>", svg)
    assert "<title>&lt;i&gt;&amp;</title>" in svg


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_the_same_chart_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    styles = make_styles(dict.fromkeys("abc", ("blue", "D")), line=True)
    series = [
        Series(name, [Point(n, n + 1.0, 0.1, (0.1, 0.2))], style) for n, (name, style) in enumerate(styles.items())
    ]
    chart = Chart("Same", [Panel("", Axis("x"), Axis("y"), series, zero=0.0)], names="points")
    paths = [tmp_path / f"{name}.{suffix}" for name in ("one", "other")]
    for path in paths:
        write_chart(chart, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(paths[0].read_bytes()) > 5_000


def test_a_chart_without_a_point_can_be_drawn() -> None:
    assert "<title>Empty</title>" in render_svg(Chart("Empty", [Panel("", Axis("x", base=10), Axis("y"), [])]))


@pytest.mark.slow
def test_gates_of_few_branches_are_all_on_some_page(tables: dict[str, TableData]) -> None:
    chart = chart_gates(tables["baselines"])
    assert chart is not None
    pages = split_pages(chart)
    assert [one for page in pages for one in page.maps] == list(chart.maps)
    assert len(pages) > 1
