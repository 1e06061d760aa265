"""Heat maps of gate weights, on pages of a readable height."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mode.charts.chart import HEAT, INK, PAPER, SOFT, HeatMap, HeatMaps
from mode.charts.layout import (
    EDGE,
    HEAD_LINE,
    LARGE,
    NOTE_LINE,
    SMALL,
    USUAL,
    Layout,
    wrap,
    write_text,
)
from mode.charts.place import Box
from mode.charts.sheet import POINTS, Place, Sheet, measure

CELL, GROUP, GAP, MARGIN, PAGE = (0.17, 0.21), 0.5, 0.06, 0.18, (9.2, 9.5)
"""Inches: size of a cell, least width of a group, gap between groups, room beside and below a map, size of a page."""


@dataclass(frozen=True)
class MapSize:
    """Sizes of a heat map in inches: of the names of its rows, of every group, and the lines of its heading."""

    names: float
    groups: Sequence[float]
    heads: Sequence[str]
    rows: int

    @property
    def cells(self) -> float:
        """Width of the cells."""
        return sum(self.groups) + GAP * (len(self.groups) - 1)

    @property
    def above(self) -> float:
        """Height of what stands above the cells."""
        return 0.15 * len(self.heads) + 0.16

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of it all."""
        return self.names + self.cells + MARGIN, self.above + CELL[1] * self.rows + MARGIN


def measure_map(one: HeatMap) -> MapSize:
    """Return the sizes of a heat map."""
    names = max(measure(name, SMALL) for name in one.rows) + 0.06
    groups = [max(GROUP, CELL[0] * len(rows[0])) for rows in one.groups.values()]
    heads = wrap(one.title, names + sum(groups), USUAL)
    return MapSize(names, groups, heads, len(one.rows))


def arrange_maps(maps: Sequence[HeatMap]) -> tuple[list[Place], tuple[float, float]]:
    """Return the upper left corner of every map in rows as wide as a page, and the size of them all."""
    places, x, y, tall, widest = [], 0.0, 0.0, 0.0, 0.0
    for wide, high in (measure_map(each).size for each in maps):
        if x and x + wide > PAGE[0]:
            x, y, tall = 0.0, y + tall, 0.0
        places.append((x, y))
        x, tall = x + wide, max(tall, high)
        widest = max(widest, x)
    return places, (widest, y + tall)


def split_pages(chart: HeatMaps) -> list[HeatMaps]:
    """Split a chart into pages of a readable height."""
    pages: list[list[HeatMap]] = []
    for each in chart.maps:
        if not pages or arrange_maps([*pages[-1], each])[1][1] > PAGE[1]:
            pages.append([])
        pages[-1].append(each)
    return [HeatMaps(chart.title, maps, chart.note) for maps in pages]


def lay_out_maps(chart: HeatMaps) -> Layout:
    """Lay out heat maps beside and below each other, with the heading above and the note below."""
    places, (width, height) = arrange_maps(chart.maps)
    heads, notes = wrap(chart.title, width, LARGE), wrap(chart.note, width, SMALL)
    above = EDGE + (HEAD_LINE * len(heads) + EDGE if heads else 0.0)
    plots = []
    for one, (x, y) in zip(chart.maps, places, strict=True):
        sizes = measure_map(one)
        left, top = EDGE + x + sizes.names, above + y + sizes.above
        plots.append((left, top, left + sizes.cells, top + CELL[1] * sizes.rows))

    def draw(sheet: Sheet) -> None:
        write_text(sheet, (EDGE, EDGE), heads, LARGE, bold=True, step=HEAD_LINE * POINTS / LARGE)
        for one, plot in zip(chart.maps, plots, strict=True):
            draw_map(sheet, one, plot)
        write_text(sheet, (EDGE, above + height), notes, SMALL, SOFT, step=NOTE_LINE * POINTS / SMALL)

    return Layout((width + EDGE, above + height + NOTE_LINE * len(notes) + EDGE), plots, draw)


def draw_map(sheet: Sheet, one: HeatMap, plot: Box) -> None:
    """Draw one heat map: a row of cells for every name, in groups of columns; values are in per cent."""
    sizes = measure_map(one)
    left, top, _, _ = plot
    wide, high = CELL
    write_text(sheet, (left - sizes.names, top - sizes.above), sizes.heads, USUAL, step=0.15 * POINTS / USUAL)
    for number, name in enumerate(one.rows):
        write_text(sheet, (left - 0.05, top + (number + 0.5) * high), [name], SMALL, SOFT, "right", middle=True)
    for (group, rows), width in zip(one.groups.items(), sizes.groups, strict=True):
        write_text(sheet, (left + width / 2.0, top - 0.14), [group], SMALL, SOFT, "center")
        wide = width / len(rows[0])
        for row, weights in enumerate(rows):
            for column, weight in enumerate(weights):
                x, y = left + column * wide, top + row * high
                sheet.box((x, y), wide - 0.008, high - 0.012, HEAT, weight)
                ink = PAPER if weight > 0.55 else INK
                middle = x + wide / 2.0, y + high / 2.0
                write_text(sheet, middle, [f"{100.0 * weight:.0f}"], SMALL - 0.5, ink, "center", middle=True)
        left += width + GAP
