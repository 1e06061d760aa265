"""What every chart is laid out with: sizes, fonts, and lines of text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mode.charts.chart import INK
from mode.charts.place import Box
from mode.charts.sheet import POINTS, Place, Sheet, Side

LEFT, RIGHT, LOW, TOP, EDGE = 0.62, 0.16, 0.46, 0.1, 0.08
"""Inches around the plot of a panel, for ticks and labels, and around a picture."""


PANEL_TITLE, HEAD_LINE, KEY_ROW, NOTE_LINE, KEY_LINE = 0.2, 0.17, 0.2, 0.15, 0.18
"""Inches: height of a panel's heading, of a line of a chart's, of a row of the key and of a line of a note; and how
much longer the sample of a line is than that of a marker."""


SMALL, USUAL, LARGE = 7.0, 8.0, 9.5
"""Sizes of fonts, in points: values and notes, names and ticks, headings."""


WRAP = 24
"""Characters of a line of a name beside its point."""


LEVEL = (4.0, 2.0)
"""Dashes of a level and of a front, in points."""


@dataclass(frozen=True)
class Layout:
    """A chart that is laid out.

    Attributes:
        size: Width and height of the picture, in inches.
        plots: Edges of what is plotted in: left, upper, right and lower.
        draw: Draws it.
    """

    size: tuple[float, float]
    plots: Sequence[Box]
    draw: Callable[[Sheet], None]


def write_text(
    sheet: Sheet,
    place: Place,
    lines: Sequence[str],
    size: float,
    colour: str = INK,
    side: Side = "left",
    *,
    bold: bool = False,
    middle: bool = False,
    step: float = 1.2,
) -> None:
    """Write lines below a place, or around it if it is their middle."""
    x, y = place
    height = step * size / POINTS
    top = y - height * len(lines) / 2.0 if middle else y
    for number, line in enumerate(lines):
        # Capital letters are 0.73 of a font's size high.
        baseline = top + (number + 0.5) * height + 0.365 * size / POINTS
        sheet.write((x, baseline), line, size, colour, side, bold=bold, turned=False)


def wrap(text: str, width: float, size: float) -> list[str]:
    """Break a text into lines that fit a width in inches."""
    return textwrap.wrap(text, max(10, int(width * POINTS / (0.57 * size)))) if text else []
