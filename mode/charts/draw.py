"""The one renderer of charts: lays out a description and draws it, as PNG or PDF or as SVG for a page."""

from __future__ import annotations

from pathlib import Path

from mode.charts.chart import Chart, HeatMaps
from mode.charts.layout import Layout
from mode.charts.maps import lay_out_maps
from mode.charts.panels import lay_out_panels
from mode.charts.sheet import FigureSheet, SvgSheet


def write_chart(chart: Chart | HeatMaps, path: Path) -> None:
    """Write a chart as PNG or PDF, by the file's suffix."""
    layout = lay_out(chart)
    sheet = FigureSheet(*layout.size)
    layout.draw(sheet)
    sheet.save(path)


def render_svg(chart: Chart | HeatMaps) -> str:
    """Render a chart as an `svg` element for a page."""
    layout = lay_out(chart)
    sheet = SvgSheet(*layout.size)
    layout.draw(sheet)
    return sheet.render(chart.title)


def lay_out(chart: Chart | HeatMaps) -> Layout:
    """Lay out a chart."""
    return lay_out_panels(chart) if isinstance(chart, Chart) else lay_out_maps(chart)
