"""Panels of series: axes, lines, markers, bars and names."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mode.charts.chart import INK, RULE, SOFT, Axis, Chart, Panel, Point, Series, Style
from mode.charts.layout import (
    EDGE,
    HEAD_LINE,
    KEY_LINE,
    KEY_ROW,
    LARGE,
    LEFT,
    LEVEL,
    LOW,
    NOTE_LINE,
    PANEL_TITLE,
    RIGHT,
    SMALL,
    TOP,
    USUAL,
    WRAP,
    Layout,
    wrap,
    write_text,
)
from mode.charts.place import Box, nearest, place_labels, spread_labels
from mode.charts.sheet import POINTS, Place, Sheet, Side, find_colour, measure


def lay_out_panels(chart: Chart) -> Layout:
    """Lay out the panels of a chart, in rows, with its heading and key above and its note below."""
    wide, high = chart.size
    columns = max(1, min(chart.columns, len(chart.panels)))
    named = [series for panel in chart.panels for series in panel.series if series.label]
    beside = chart.names == "ends" and named
    gutter = max(measure(series.label, USUAL) for series in named) + 0.15 if beside else 0.0
    cell = LEFT + wide + RIGHT + gutter, TOP + high + LOW + PANEL_TITLE * any(panel.title for panel in chart.panels)
    width = columns * cell[0]
    key = arrange_key(named, width - 2 * EDGE - LEFT) if chart.names == "key" else []
    heads, notes = wrap(chart.title, width - LEFT, LARGE), wrap(chart.note, width - LEFT - EDGE, SMALL)
    above = EDGE + HEAD_LINE * len(heads) + EDGE + KEY_ROW * len(key)
    below = above + math.ceil(len(chart.panels) / columns) * cell[1]
    plots = []
    for number in range(len(chart.panels)):
        row, column = divmod(number, columns)
        left, low = column * cell[0] + LEFT, above + (row + 1) * cell[1] - LOW
        plots.append((left, low - high, left + wide, low))

    def draw(sheet: Sheet) -> None:
        write_text(sheet, (LEFT, EDGE), heads, LARGE, bold=True, step=HEAD_LINE * POINTS / LARGE)
        for row, entries in enumerate(key):
            draw_key(sheet, entries, above - KEY_ROW * (len(key) - row - 0.5))
        for panel, plot in zip(chart.panels, plots, strict=True):
            frame = fit_frame(panel, plot)
            draw_axes(sheet, frame, panel)
            for series in sorted(panel.series, key=lambda each: bool(each.style.colour)):
                draw_series(sheet, frame, series)
            if chart.names == "points":
                name_points(sheet, frame, panel)
            elif chart.names == "ends":
                name_ends(sheet, frame, panel)
        write_text(sheet, (LEFT, below), notes, SMALL, SOFT, step=NOTE_LINE * POINTS / SMALL)

    return Layout((width, below + NOTE_LINE * len(notes) + EDGE * bool(notes)), plots, draw)


def arrange_key(named: Sequence[Series], width: float) -> list[list[tuple[float, Series]]]:
    """Return the entries of a key by row, each with its place; a name that several panels have is there once."""
    rows: list[list[tuple[float, Series]]] = []
    at = math.inf
    for series in {series.label: series for series in named}.values():
        takes = measure(series.label, USUAL) + 0.16 + KEY_LINE * (series.style.line or series.level)
        if at + takes > width:
            rows.append([])
            at = 0.0
        rows[-1].append((at, series))
        at += takes + 0.24
    return rows


def draw_key(sheet: Sheet, entries: Sequence[tuple[float, Series]], y: float) -> None:
    """Draw a row of the key."""
    for at, series in entries:
        left, right = LEFT + at, LEFT + at + 0.1 + KEY_LINE * (series.style.line or series.level)
        if series.style.line or series.level:
            sheet.line([[(left, y), (right, y)]], *choose_line(series))
        if series.style.marker and not series.level:
            sheet.mark(((left + right) / 2.0, y), series.style, choose_radius(series.style, 0.3))
        write_text(sheet, (right + 0.06, y), [series.label], USUAL, middle=True)


def choose_line(series: Series) -> tuple[str, float, Sequence[float]]:
    """Return colour, width and dashes of a series' line."""
    style = series.style
    return find_colour(style), 1.4 if style.colour else 0.8, LEVEL if series.level else style.dashes


def choose_radius(style: Style, size: float) -> float:
    """Return the radius of a style's marker in points, larger for a larger size between 0 and 1."""
    return (2.5 + 2.25 * size) * (1.3 if style.marker == "*" else 1.0) if style.colour else 1.75


@dataclass(frozen=True)
class Scale:
    """Puts values between two limits at places between two others, by their logarithm to a base other than 0."""

    low: float
    high: float
    start: float
    stop: float
    base: int

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high, at = (math.log(each) if self.base else each for each in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.stop - self.start)


@dataclass(frozen=True)
class Frame:
    """The plot of a panel: its edges and the scales of its axes."""

    plot: Box
    x: Scale
    y: Scale

    def place(self, x: float, y: float) -> Place:
        """Return the place of a point."""
        return self.x(x), self.y(y)


def fit_frame(panel: Panel, plot: Box) -> Frame:
    """Return a frame that holds every point of a panel with its bars."""
    points = [point for series in panel.series for point in series.points]
    across = [end for series in panel.series if not series.level for point in series.points for end in span_x(point)]
    left, top, right, low = plot
    x = fit_scale(panel.x, [*across, *([] if panel.zero is None else [panel.zero])], left, right)
    up = [end for point in points for end in span_y(point)]
    y = fit_scale(panel.y, [*up, *([] if panel.unity is None else [panel.unity])], low, top)
    return Frame(plot, x, y)


def span_x(point: Point) -> tuple[float, float]:
    """Return where the bar across a point ends."""
    return point.x - point.x_error, point.x + point.x_error


def span_y(point: Point) -> tuple[float, float]:
    """Return where the bar through a point ends."""
    return point.y - point.y_error[0], point.y + point.y_error[1]


def fit_scale(axis: Axis, values: Sequence[float], start: float, stop: float) -> Scale:
    """Return a scale that holds all values with some room beside them."""
    found = [value for value in values if not axis.base or value > 0.0] or [1.0]
    low, high = min(found), max(found)
    if axis.base:
        room = max((high / low) ** 0.06, 1.08)
        return Scale(low / room, high * room, start, stop, axis.base)
    least = low if axis.low is None else axis.low
    room = 0.07 * (high - least) or 0.05 * abs(high) or 1.0
    return Scale(low - room if axis.low is None else axis.low, high + room, start, stop, 0)


def choose_ticks(low: float, high: float, base: int) -> list[float]:
    """Return round values between two, at most seven; of an axis that is logarithmic to a base other than 0.

    >>> choose_ticks(0.0, 9.0, 0), choose_ticks(3.0, 150.0, 10), choose_ticks(100.0, 70000.0, 2)
    ([0.0, 2.0, 4.0, 6.0, 8.0], [5.0, 10.0, 20.0, 50.0, 100.0], [128.0, 512.0, 2048.0, 8192.0, 32768.0])
    """
    if not base:
        rough = (high - low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= 0.99 * rough)
        numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
        # Digits beyond a step's are of the binary representation.
        return [round(number * step, 12) + 0.0 for number in numbers]
    powers = range(math.floor(math.log(low, base)) - 1, math.ceil(math.log(high, base)) + 2)
    digits = (1, 2, 5) if base == 10 and high / low < 100.0 else (1,)
    values = [digit * float(base) ** power for power in powers for digit in digits]
    inside = [value for value in values if low <= value <= high]
    return inside[:: math.ceil(len(inside) / 6)]


def write_tick(value: float) -> str:
    """Write a value beside an axis.

    >>> write_tick(-2.0), write_tick(0.25), write_tick(1500.0)
    ('−2', '0.25', '1,500')
    """
    return f"{round(value, 10):,.10g}".replace("-", "−")


def draw_axes(sheet: Sheet, frame: Frame, panel: Panel) -> None:
    """Draw grid, ticks, labels, the lines that mark no change, and the front."""
    left, top, right, low = frame.plot
    across = list(panel.x.ticks) or choose_ticks(frame.x.low, frame.x.high, panel.x.base)
    up = list(panel.y.ticks) or choose_ticks(frame.y.low, frame.y.high, panel.y.base)
    grid = [[(frame.x(value), top), (frame.x(value), low)] for value in across]
    grid += [[(left, frame.y(value)), (right, frame.y(value))] for value in up]
    if grid:
        sheet.line(grid, RULE, 0.6)
    sheet.line([[(left, top), (left, low), (right, low)]], SOFT, 0.7)
    marks = [[(frame.x(panel.zero), top), (frame.x(panel.zero), low)]] if panel.zero is not None else []
    marks += [[(left, frame.y(panel.unity)), (right, frame.y(panel.unity))]] if panel.unity is not None else []
    if marks:
        sheet.line(marks, SOFT, 0.8)
    if panel.front:
        sheet.line([trace_front(frame, panel)], SOFT, 0.8, LEVEL)
    for value in across:
        write_text(sheet, (frame.x(value), low + 0.03), [write_tick(value)], USUAL, SOFT, "center")
    for value in up:
        write_text(sheet, (left - 0.05, frame.y(value)), [write_tick(value)], USUAL, SOFT, "right", middle=True)
    write_text(sheet, ((left + right) / 2.0, low + 0.2), [panel.x.label], USUAL, side="center")
    taken = max((measure(write_tick(value), USUAL) for value in up), default=0.0)
    middle = max(left - 0.12 - taken, left - LEFT + 0.12), (top + low) / 2.0
    sheet.write(middle, panel.y.label, USUAL, INK, "center", bold=False, turned=True)
    if panel.title:
        write_text(sheet, (left, top - 0.2), [panel.title], USUAL + 0.5)


def trace_front(frame: Frame, panel: Panel) -> list[Place]:
    """Return the corners of a front, from the left edge over its steps to the lower edge."""
    left, _, _, low = frame.plot
    corners = [(left, frame.y(panel.front[0][1]))]
    for x, y in panel.front:
        corners += [(corners[-1][0], frame.y(y)), (frame.x(x), frame.y(y))]
    return [*corners, (corners[-1][0], low)]


def draw_series(sheet: Sheet, frame: Frame, series: Series) -> None:
    """Draw one series: its line, its bars and its markers."""
    if series.level:
        y = frame.y(series.points[0].y)
        sheet.line([[(frame.plot[0], y), (frame.plot[2], y)]], *choose_line(series))
        return
    if series.style.line and len(series.points) > 1:
        sheet.line([trace_line(frame, series)], *choose_line(series))
    bars = [bar for point in series.points for bar in trace_bars(frame, point)]
    if bars and series.style.colour:
        sheet.line(bars, find_colour(series.style), 1.0)
    if series.style.marker:
        for point in series.points:
            radius = choose_radius(series.style, point.size)
            sheet.mark(frame.place(point.x, point.y), series.style, radius, point.note)


def trace_line(frame: Frame, series: Series) -> list[Place]:
    """Return the corners of a series' line."""
    places = [frame.place(point.x, point.y) for point in series.points]
    if not series.steps:
        return places
    corners = [corner for before, after in pairwise(places) for corner in (before, (after[0], before[1]))]
    return [*corners, places[-1]]


def trace_bars(frame: Frame, point: Point) -> Iterator[list[Place]]:
    """Return the bars of a point, as far as they have a length."""
    if point.x_error:
        yield [frame.place(end, point.y) for end in span_x(point)]
    if any(point.y_error):
        yield [frame.place(point.x, end) for end in span_y(point)]


# --- names


def name_points(sheet: Sheet, frame: Frame, panel: Panel) -> None:
    """Write the names of series beside their points, with a thin line to those that are further away."""
    named = [series for series in panel.series if series.label]
    texts = [textwrap.wrap(series.label, WRAP) for series in named]
    sizes = [
        (POINTS * max(measure(line, SMALL, bold=series.strong) for line in lines) + 1.0, 1.15 * SMALL * len(lines))
        for series, lines in zip(named, texts, strict=True)
    ]
    discs = {id(point): make_disc(frame, series, point) for series in panel.series for point in series.points}
    blocked = [(x - radius, y - radius, x + radius, y + radius) for x, y, radius in discs.values()]
    blocked += [surround(bar) for series in named for point in series.points for bar in trace_bars(frame, point)]
    front = trace_front(frame, panel) if panel.front else []
    lines = [surround(ends) for ends in pairwise(front)]
    if panel.zero is not None:
        lines.append(surround([(frame.x(panel.zero), edge) for edge in frame.plot[1::2]]))
    left, top, right, low = (POINTS * edge for edge in frame.plot)
    points = [discs[id(series.points[0])] for series in named]
    bounds = (left + 3.0, top - 4.0, right + 6.0, low - 3.0)
    placed = place_labels(points, sizes, blocked, lines, bounds)
    for series, text, point, box in zip(named, texts, points, placed, strict=True):
        x, y, radius = point
        end = nearest(point, box)
        far = math.hypot(end[0] - x, end[1] - y)
        if far > radius + 10.0:
            start = (x + radius / far * (end[0] - x), y + radius / far * (end[1] - y))
            sheet.line([[(a / POINTS, b / POINTS) for a, b in (start, end)]], SOFT, 0.5)
        side: Side = "left" if box[0] >= x - 1.0 else "right" if box[2] <= x + 1.0 else "center"
        at = {"left": box[0], "right": box[2], "center": (box[0] + box[2]) / 2.0}[side]
        middle = at / POINTS, (box[1] + box[3]) / 2.0 / POINTS
        write_text(sheet, middle, text, SMALL, side=side, bold=series.strong, middle=True, step=1.15)


def make_disc(frame: Frame, series: Series, point: Point) -> tuple[float, float, float]:
    """Return the centre and the radius of a point's marker, with a little room, in points."""
    x, y = frame.place(point.x, point.y)
    return POINTS * x, POINTS * y, choose_radius(series.style, point.size) + 1.0


def surround(ends: Sequence[Place]) -> Box:
    """Return a thin box around a line, in points."""
    xs, ys = zip(*ends, strict=True)
    return POINTS * min(xs) - 1.0, POINTS * min(ys) - 1.0, POINTS * max(xs) + 1.0, POINTS * max(ys) + 1.0


def name_ends(sheet: Sheet, frame: Frame, panel: Panel) -> None:
    """Write the names of series at the right, each beside the end of its line as far as there is room."""
    named = [series for series in panel.series if series.label]
    _, top, right, low = frame.plot
    ends = [frame.place(series.points[-1].x, series.points[-1].y) for series in named]
    heights = spread_labels([y for _, y in ends], 0.155, top, low)
    furthest = max((x for x, _ in ends), default=0.0)
    for series, (x, y), height in zip(named, ends, heights, strict=True):
        if x > furthest - 0.05:
            leader = [(x + 0.05, y), (right + 0.02, height), (right + 0.08, height)]
            sheet.line([leader], find_colour(series.style), 0.5)
        if series.style.marker:
            sheet.mark((right + 0.15, height), series.style, choose_radius(series.style, 0.0))
        write_text(sheet, (right + 0.23, height), [series.label], USUAL, middle=True)
