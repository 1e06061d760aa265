"""Charts of tables: target accuracy over retention, curves, frontiers and mean gate weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from markupsafe import Markup

from mode.charts.chart import (
    CONTEXT_STYLE,
    Axis,
    Chart,
    HeatMap,
    HeatMaps,
    Panel,
    Point,
    Series,
    Style,
    make_styles,
)
from mode.charts.colours import METHODS, OTHER, REFERENCES
from mode.charts.draw import render_svg
from mode.tables.columns import RETENTION
from mode.tables.compile import BACKBONE, RowResult, TableData
from mode.tables.findings import collect_points, find_value
from mode.tables.frontier import MOST, list_frontiers
from mode.tables.pareto import MEASURES, Place, Tradeoff, collect_sides, compute_tradeoff
from mode.tables.statistics import Cell
from mode.tables.table import SIGNS, last_value

AXES = {
    "added": "Added parameters (millions)",
    "domains": "Domains adapted to",
    "examples": "Different rows in the mix",
    "share": "Share of the mix that the anchor takes",
    "weight": "Weight of the anchor's divergence",
}
"""Labels of the x axes of curves, by `Curves.x`."""


COST_AXES = {
    "total": "Parameters (millions)",
    "generation": "10⁶ operations per token",
    "own": "Weight of the own branch (%)",
}
"""Labels of the y axes of curves, by the name of a cost."""


MIX = "the mix"
"""Name of the targets of a row whose settings do not name targets."""


MOST_BRANCHES = 8
"""Maximum number of branches of a row in a figure of gate weights."""


def chart_tradeoff(compiled: TableData) -> Chart:
    """Return the chart of target accuracy over retention, with the cost as marker size and the Pareto front.

    Rows with different targets are not compared: every set of targets with several rows has a panel of its own.
    """
    groups = split_by_targets(compiled)
    if len(groups) > 1:
        return chart_groups(compiled, groups)
    (group,) = groups.values()
    chart = chart_rivals(group, *collect_sides(compiled))
    left_out = len(compute_tradeoff(compiled).places) - len(compute_tradeoff(group).places)
    rest = f" Not drawn: {left_out} rows that are adapted to other domains." if left_out else ""
    return replace(chart, note=chart.note + rest)


def split_by_targets(compiled: TableData) -> dict[str, TableData]:
    """Return a table for each set of targets, by its name. Sets of one or two rows are left out if there are larger."""
    if compiled.targets:
        return {"": compiled}
    sets: dict[tuple[str, ...], list[RowResult]] = {}
    for place in compute_tradeoff(compiled).places:
        sets.setdefault(find_targets(compiled, place.line.name), []).append(place.line)
    found = {targets: lines for targets, lines in sets.items() if len(lines) > 2} or sets
    return {
        name_targets(targets): replace(compiled, lines=tuple(lines), targets=targets)
        for targets, lines in found.items()
    } or {"": compiled}


def find_targets(compiled: TableData, name: str) -> tuple[str, ...]:
    """Return the targets in a row's settings; `MIX` if the settings do not name targets."""
    row = next(row for row in compiled.table.rows if row.name == name)
    targets = last_value([*compiled.table.overrides, *row.overrides], "targets")
    return tuple(targets) if targets else (MIX,)


def name_targets(targets: Sequence[str]) -> str:
    """Return the name of a set of targets.

    >>> name_targets(["code", "math", "verilog"]), name_targets(["the mix"])
    ('Code, Math and Verilog', 'the mix')
    """
    *first, last = (name if name == MIX else name.capitalize() for name in targets)
    return f"{', '.join(first)} and {last}" if first else last


def chart_rivals(compiled: TableData, others: str, adapted: str) -> Chart:
    """Return the chart of rows with the same targets; `others` and `adapted` name retention domains and targets."""
    seen = compute_tradeoff(compiled)
    styles = make_styles({name: find_method(compiled, name) for name in choose_named(compiled)})
    labels = write_labels(compiled)
    series = [
        Series(
            labels[place.line.name] if place.line.name in styles else "",
            [make_point(place, seen)],
            styles.get(place.line.name, CONTEXT_STYLE),
            strong=place.best and seen.rivals,
        )
        for place in seen.places
    ]
    panel = Panel(
        "",
        Axis(f"Retention: change on {others or 'the other domains'} (points)"),
        Axis(f"Target accuracy: {adapted or 'what a row is adapted to'} (%)"),
        series,
        zero=0.0,
        front=seen.front,
    )
    unnamed = len(series) - len(styles)
    grey = f" Grey: {unnamed} other rows of the table." if unnamed else ""
    note = seen.legend + grey if series else "No result yet."
    return Chart(compiled.table.title, [panel], names="points", note=note)


def chart_groups(compiled: TableData, groups: Mapping[str, TableData]) -> Chart:
    """Return the chart of rows with different targets: a panel for each set of targets.

    One key has all names if there are enough styles. Else the names are beside the points of every panel.
    """
    labels, shared = label_groups(compiled, groups)
    panels = []
    for title, group in groups.items():
        styles = style_group(group, labels, title, shared)
        seen = compute_tradeoff(group)
        series = []
        for place in seen.places:
            label = labels[title, place.line.name]
            named = label if label in styles else ""
            series.append(Series(named, [make_point(place, seen)], styles.get(label, CONTEXT_STYLE)))
        across, up = Axis("Retention (points)"), Axis("Target accuracy (%)")
        panels.append(Panel(head_group(title), across, up, series, zero=0.0, front=seen.front))
    measure = compute_tradeoff(next(iter(groups.values()))).measure
    note = f"Size: {MEASURES[measure]}. Dashed: the best of accuracy and retention at any cost."
    title = compiled.table.title
    if shared:
        return Chart(title, panels, columns=3, size=(2.4, 2.0), note=note)
    note += " Grey: other rows of the table."
    return Chart(title, panels, columns=2, names="points", size=(4.0, 3.4), note=note)


def label_groups(
    compiled: TableData, groups: Mapping[str, TableData], *, line: bool = False
) -> tuple[dict[tuple[str, str], str], bool]:
    """Return the labels of rows by group and name, without targets, and whether there are styles for all of them."""
    written = write_labels(compiled)
    labels = {
        (title, row.name): drop_targets(written[row.name], title)
        for title, group in groups.items()
        for row in group.lines
    }
    methods = {label: find_method(compiled, name) for (_, name), label in labels.items()}
    return labels, len(make_styles(methods, line=line)) == len(methods)


def style_group(
    group: TableData, labels: Mapping[tuple[str, str], str], title: str, shared: bool, *, line: bool = False
) -> dict[str, Style]:
    """Return the style of each named row of a group, by its label: those of all groups' rows if they are shared."""
    if shared:
        wanted = {label: find_method(group, name) for (_, name), label in labels.items()}
    else:
        wanted = {labels[title, name]: find_method(group, name) for name in choose_named(group)}
    return make_styles(wanted, line=line)


def head_group(title: str) -> str:
    """Return the heading of a panel of rows with the same targets. Two names fit over a panel, more are counted.

    >>> head_group("Code and Math"), head_group("Code, Math and Verilog")
    ('Adapted to Code and Math', 'Adapted to 3 domains')
    """
    return f"Adapted to {title.count(',') + 2} domains" if "," in title else f"Adapted to {title}"


def choose_named(compiled: TableData) -> list[str]:
    """Return the names of the rows to label, in the table's order. Their number is limited by the number of styles.

    Priority: the backbone, the Pareto front, full fine-tuning and LoRA, the rows of the table's differences, the first
    row of every other method, and all other rows by decreasing average.
    """
    seen = compute_tradeoff(compiled)
    averages = {place.line.name: cell.mean for place in seen.places if (cell := place.line.cell("average"))}
    plain: dict[tuple[str, str], str] = {}
    for place in sorted(seen.places, key=lambda place: place.index):
        plain.setdefault(find_method(compiled, place.line.name), place.line.name)

    compared = {name for pair in compiled.table.differences for name in pair}

    def rank(place: Place) -> tuple[bool, bool, bool, bool, bool, float]:
        name = place.line.name
        average, first = averages.get(name, -math.inf), name in plain.values()
        reference = first and find_method(compiled, name) in REFERENCES
        first_of_all = name != BACKBONE, place.means[:2] not in seen.front, not reference
        return *first_of_all, name not in compared, not first, -average

    chosen: list[Place] = []
    for place in sorted(seen.places, key=rank):
        names = [*(each.line.name for each in chosen), place.line.name]
        if len(make_styles({name: find_method(compiled, name) for name in names})) == len(names):
            chosen.append(place)
    return [place.line.name for place in sorted(chosen, key=lambda place: place.index)]


def find_method(compiled: TableData, name: str) -> tuple[str, str]:
    """Return the colour and the marker of the method of a row."""
    row = next(row for row in compiled.table.rows if row.name == name)
    method = last_value([*compiled.table.overrides, *row.overrides], "method") or ""
    return METHODS.get(method) or METHODS.get(method.partition("-")[0], OTHER)


def write_labels(compiled: TableData) -> dict[str, str]:
    """Return the label of every row for use outside its table, without the sign of a note.

    A label that begins with dots continues the row above. The method of that row is put before it.
    """
    found = {}
    method = ""
    for line in compiled.lines:
        label = line.label.rstrip("".join(SIGNS) + " ")
        if label.startswith("..."):
            label = f"{method}: {label.removeprefix('...').strip()}"
        else:
            method = label.partition(",")[0].partition(" on ")[0]
        found[line.name] = label
    return found


def drop_targets(label: str, targets: str) -> str:
    """Return the label of a row without its targets.

    >>> drop_targets("SFT on Code and Math, English replayed", "Code and Math"), drop_targets("LoRA, on Code", "Code")
    ('SFT, English replayed', 'LoRA')
    """
    return label.replace(f", on {targets}", "").replace(f" on {targets}", "")


def make_point(place: Place, seen: Tradeoff) -> Point:
    """Return the point of a row."""
    return Point(
        place.retention.mean,
        place.target.mean,
        measure_spread(place.retention),
        (measure_spread(place.target),) * 2,
        seen.size(place),
        describe_place(place, seen.measure),
    )


def describe_place(place: Place, measure: str) -> str:
    """Return the target accuracy, retention and cost of a row as text."""
    kept, target = place.retention.text(signed=True), place.target.text()
    return f"{place.line.label}: target {target} %, retention {kept}, {place.cost:,.4g} {MEASURES[measure]}"


def measure_spread(cell: Cell) -> float:
    """Return the standard deviation over seeds; 0 with a single seed."""
    return 0.0 if math.isnan(cell.std) else cell.std


def chart_curves(compiled: TableData) -> Chart:
    """Return the chart of a table's panels of curves with any point. A line has the same style in all panels."""
    curves = compiled.table.curves
    methods = {
        label: find_method(compiled, names[0]) for panel in curves for label, names in panel.lines.items() if names
    }
    styles = make_styles(methods, line=True)
    panels = []
    for panel in curves:
        series = []
        for label in panel.lines:
            points = [
                Point(x, cell.mean, y_error=(measure_spread(cell),) * 2)
                for x, row in collect_points(compiled, panel, label).items()
                if (cell := find_value(row, panel.column)) is not None
            ]
            if points:
                # A row without added parameters is drawn as a horizontal reference line.
                level = [point.x for point in points] == [0.0]
                style = styles.get(label, CONTEXT_STYLE)
                series.append(Series(label if label in styles else "", points, style, level=level))
        places = sorted({point.x for each in series if not each.level for point in each.points})
        apart = all(second > 1.5 * first > 0.0 for first, second in pairwise(places))
        ticks = places if len(places) <= 6 and apart else ()
        axis = Axis(AXES[panel.x], ticks=places) if panel.x == "domains" else Axis(AXES[panel.x], base=10, ticks=ticks)
        unit = "points" if panel.column == RETENTION else "%"
        up = COST_AXES.get(panel.column, f"{panel.column.capitalize()} ({unit})")
        if series:
            panels.append(Panel(panel.title, axis, Axis(up), series))
    size = (5.0, 3.4) if len(panels) == 1 else (2.9, 2.5)
    return Chart(compiled.table.title, panels, columns=3, size=size)


def chart_frontiers(compiled: TableData) -> Chart | None:
    """Return the chart of the best target accuracy over the tolerated loss, a line a method; None without frontiers."""
    frontiers = [each for each in list_frontiers(compiled) if each.mean_gain > 0.0] if compiled.table.frontiers else []
    if not frontiers:
        return None
    ranked = sorted(frontiers, key=lambda each: -each.mean_gain)
    styles = make_styles({each.label: find_method(compiled, each.rows[0].name) for each in ranked}, line=True)
    series = [
        Series(
            each.label if each.label in styles else "",
            [Point(loss, target) for loss, target in each.steps],
            styles.get(each.label, CONTEXT_STYLE),
            steps=True,
        )
        for each in frontiers
    ]
    others, adapted = collect_sides(compiled)
    across, up = Axis(f"Tolerated loss on {others} (points)"), Axis(f"Best target accuracy: {adapted} (%)")
    panel = Panel("", across, up, series)
    note = f"Markers: the best setting of a method at its loss. Lines end at {MOST:g} points."
    return Chart(compiled.table.title, [panel], names="ends", size=(4.6, 3.4), note=note)


def chart_to_svg(chart: Chart | HeatMaps | None) -> Markup:
    """Return a chart as SVG for a page; empty without a chart."""
    return Markup('<figure class="chart">{}</figure>').format(Markup(render_svg(chart))) if chart else Markup("")


def chart_table(compiled: TableData) -> Chart:
    """Return the chart of a table: its curves if any has a point, its frontiers, or target accuracy over retention."""
    curves = chart_curves(compiled)
    return curves if curves.panels else chart_frontiers(compiled) or chart_tradeoff(compiled)


def chart_gates(compiled: TableData) -> HeatMaps | None:
    """Return the heat maps of mean gate weights, for rows with at most `MOST_BRANCHES` branches; None without gates."""
    maps = []
    labels = write_labels(compiled)
    for line in compiled.lines:
        if line.gates and len(line.branches) <= MOST_BRANCHES:
            # For each domain, one row of weights per branch and one column per block.
            groups = {name.capitalize(): list(zip(*blocks, strict=True)) for name, blocks in line.gates.items()}
            maps.append(HeatMap(labels[line.name], line.branches, groups))
    note = "Mean gate weights of the branches on every domain's tokens, in per cent; a column for every block."
    return HeatMaps(compiled.table.title, maps, note) if maps else None
