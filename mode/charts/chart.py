"""What a chart shows: panels of series or of heat maps, with their axes, styles and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

PALETTE = {
    "black": "#3c4046",
    "orange": "#a83c00",
    "amber": "#c08a00",
    "sky": "#2b8cc4",
    "blue": "#00548a",
    "green": "#008262",
    "pink": "#b9588f",
}
"""Colours of series: those of Okabe and Ito, darker where they would be faint on white."""


INK, SOFT, RULE, PAPER, CONTEXT = "#1b1f24", "#59636e", "#d9dee3", "#ffffff", "#a3abb3"
"""Colours of text, of lines that explain, of the grid, of the background, and of series that are not named."""


HEAT = "#00507f"
"""Colour of a heat map's cell of weight 1; other cells let the background through."""


FILLS = ("full", "none", "light", "left", "top", "right", "bottom")
"""How a marker is filled: what tells the variants of one method apart."""


DASHES = ((), (5.0, 2.0), (1.5, 1.5), (7.0, 2.0, 1.5, 2.0), (3.0, 1.5), (9.0, 3.0), (5.0, 1.5, 1.5, 1.5, 1.5, 1.5))
"""Dashes of lines, each the line that goes with the fill at its place in `FILLS`; the first is solid."""


MOST_NAMED = 12
"""Series that a panel names; the others are its context, in grey."""


@dataclass(frozen=True)
class Style:
    """How a series looks.

    Attributes:
        colour: Name of a colour of the palette; empty for a series of the context.
        marker: Shape of its points, in matplotlib's notation; empty for a line alone.
        fill: Fill of its points.
        line: Whether its points are joined.
        dashes: Lengths of dashes and gaps of its line.
    """

    colour: str
    marker: str = "o"
    fill: str = "full"
    line: bool = False
    dashes: tuple[float, ...] = ()


CONTEXT_STYLE = Style("", fill="none")
"""Style of the points that are not named."""


@dataclass(frozen=True)
class Point:
    """A point of a series.

    Attributes:
        x: Its place across.
        y: Its place up.
        x_error: Half the length of the bar across it.
        y_error: How far the bar through it goes down and up.
        size: Between 0 and 1: how large its marker is.
        note: What a pointer on it shows, in a page.
    """

    x: float
    y: float
    x_error: float = 0.0
    y_error: tuple[float, float] = (0.0, 0.0)
    size: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        label: Name; empty for context and for a line that goes with a named one.
        points: Its points, in order.
        style: How it looks.
        level: Whether it is a height to compare with: a line at its first point, across the panel.
        strong: Whether its name is set in bold.
        steps: Whether its line keeps the height of a point up to the next point.
    """

    label: str
    points: Sequence[Point]
    style: Style
    level: bool = False
    strong: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        label: What is on it.
        base: Base of its logarithm; 0 where it is linear.
        ticks: Values to write; chosen by the renderer where there are none.
        low: Where it begins at the latest.
    """

    label: str = ""
    base: int = 0
    ticks: Sequence[float] = ()
    low: float | None = None


@dataclass(frozen=True)
class Panel:
    """Series over two axes.

    Attributes:
        title: Heading; empty where the chart's says all.
        x: Axis across.
        y: Axis up.
        series: What is drawn.
        zero: Where a vertical line marks no change.
        unity: Where a horizontal line marks no change.
        front: Corners of a Pareto front, drawn as steps from the left edge to the lower one.
    """

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    zero: float | None = None
    unity: float | None = None
    front: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class HeatMap:
    """Weights between 0 and 1, in groups of columns.

    Attributes:
        title: Heading.
        rows: Names of the rows.
        groups: By name, the weights of every row and column of the group.
    """

    title: str
    rows: Sequence[str]
    groups: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: Heading.
        panels: Its panels, in reading order.
        columns: Panels in a row.
        names: Where the names of series stand: beside their points, at the ends of their lines, or in a key above all
            panels.
        size: Width and height of a panel's axes, in inches.
        note: What a reader has to know, below.
    """

    title: str
    panels: Sequence[Panel]
    columns: int = 1
    names: Literal["points", "ends", "key"] = "key"
    size: tuple[float, float] = (5.6, 4.0)
    note: str = ""


@dataclass(frozen=True)
class HeatMaps:
    """A chart of heat maps, as many in a row as fit.

    Attributes:
        title: Heading.
        maps: The heat maps.
        note: What a reader has to know, below.
    """

    title: str
    maps: Sequence[HeatMap]
    note: str = ""


def make_styles(methods: Mapping[str, tuple[str, str]], *, line: bool = False) -> dict[str, Style]:
    """Give every name a style of its own, as long as its method has fills left.

    Args:
        methods: By name, the colour and the marker of its method.
        line: Whether points are joined.

    Returns:
        A style by name, of the first names of every method, `MOST_NAMED` in all.

    >>> found = make_styles({"LoRA r 4": ("amber", "s"), "LoRA r 8": ("amber", "s"), "SFT": ("orange", "o")})
    >>> [(style.colour, style.marker, style.fill) for style in found.values()]
    [('amber', 's', 'full'), ('amber', 's', 'none'), ('orange', 'o', 'full')]
    """
    found: dict[str, Style] = {}
    for name, (colour, marker) in methods.items():
        number = sum((each.colour, each.marker) == (colour, marker) for each in found.values())
        if number < len(FILLS) and len(found) < MOST_NAMED:
            found[name] = Style(colour, marker, FILLS[number], line, DASHES[number] if line else ())
    return found
