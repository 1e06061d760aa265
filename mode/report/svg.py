"""Figures as SVG inside a page: text stays text, colours are the page's, and a shape or dash says the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile

from markupsafe import Markup

from mode.report.figures import AXES
from mode.tables.compile import RowResult, TableData
from mode.tables.findings import collect_points
from mode.tables.pareto import MEASURES, Place, collect_sides, compute_tradeoff
from mode.tables.table import Curves

COLOURS = 7
"""Colours that the page's style sheet defines, as classes c0, c1 and so on."""


DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5")


WIDTH, HEIGHT = 640.0, 400.0


LEFT, RIGHT, TOP, BOTTOM = 64.0, 624.0, 34.0, 344.0
"""Edges of what is plotted in."""


CELL = (52.0, 22.0)
"""Width and height of a cell of a heat map."""


def tag(name: str, *inside: str, **attributes: object) -> Markup:
    """Return an element; texts and values are escaped.

    >>> tag("text", "1 < 2", class_="tick", text_anchor="end")
    Markup('<text class="tick" text-anchor="end">1 &lt; 2</text>')
    """
    given = [Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()]
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup("").join(given), Markup("").join(inside))


@dataclass(frozen=True)
class Scale:
    """Puts values from `low` to `high` between two places of the drawing, by their logarithm if asked."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value, to a tenth."""
        low, high, at = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return round(self.start + (at - low) / (high - low) * (self.stop - self.start), 1)

    @property
    def ticks(self) -> list[float]:
        """Round values to write on the axis.

        >>> Scale(0.0, 9.0, 0.0, 1.0).ticks, Scale(3.0, 150.0, 0.0, 1.0, log=True).ticks
        ([0.0, 2.0, 4.0, 6.0, 8.0], [5.0, 10.0, 20.0, 50.0, 100.0])
        """
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            inside = [value for value in every if self.low <= value <= self.high]
            return inside if len(inside) <= 7 else inside[::3]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= 0.99 * rough)
        first = math.ceil(self.low / step)
        # Digits beyond a step's are of the binary representation.
        values = (round((first + number) * step, 12) for number in count())
        return [value + 0.0 for value in takewhile(lambda value: value <= self.high, values)]


def fit(values: Sequence[float], start: float, stop: float, *, log: bool = False) -> Scale:
    """Return a scale that holds all values with some room beside them."""
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.06, 1.1)
        return Scale(low / room, high * room, start, stop, log)
    room = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low - room, high + room, start, stop)


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        label: What it is called.
        points: Its x, y, and half the length of the bar through it, which is 0 where there is none.
        marked: Whether its points have marks.
    """

    label: str
    points: Sequence[tuple[float, float, float]]
    marked: bool = True

    @property
    def level(self) -> bool:
        """Whether it is a height to compare with: its only point is where nothing was added."""
        return [x for x, _, _ in self.points] == [0.0]


def colour(index: int) -> str:
    """Return the class of a series' colour."""
    return f"c{index % COLOURS}"


def mark(index: int, x: float, y: float, radius: float, *, filled: bool = True) -> Markup:
    """Return the mark of a series."""
    place = f"translate({x} {y}) scale({radius:.2f})"
    style = f"mark {colour(index)}" + ("" if filled else " hollow")
    return tag("use", href=f"#mark{index % len(SHAPES)}", transform=place, class_=style)


def drawing(title: str, *inside: str, height: float = HEIGHT, width: float = WIDTH) -> Markup:
    """Return a whole drawing."""
    return tag("svg", tag("title", title), *inside, viewBox=f"0 0 {width:g} {height:g}", role="img")


def frame(x: Scale, y: Scale, across: str, up: str) -> list[Markup]:
    """Return grid, ticks and the titles of both axes, of which the upper one stands above the plot, to be read."""
    parts = []
    for value in x.ticks:
        parts.append(tag("line", x1=x(value), x2=x(value), y1=TOP, y2=BOTTOM, class_="grid"))
        parts.append(tag("text", told(value), x=x(value), y=BOTTOM + 20, class_="tick", text_anchor="middle"))
    for value in y.ticks:
        parts.append(tag("line", x1=LEFT, x2=RIGHT, y1=y(value), y2=y(value), class_="grid"))
        parts.append(tag("text", told(value), x=LEFT - 8, y=y(value) + 4, class_="tick", text_anchor="end"))
    parts.append(tag("text", across, x=RIGHT, y=HEIGHT - 8, class_="axis", text_anchor="end"))
    return [*parts, tag("text", up, x=8, y=18, class_="axis")]


def told(value: float) -> str:
    """Write a tick.

    >>> told(-2.0), told(0.25), told(1500.0)
    ('−2', '0.25', '1,500')
    """
    return f"{value:,.10g}".replace("-", "−")


def bars(x: float, y: float, left: float, right: float, low: float, high: float, style: str) -> Markup:
    """Return the bars through a point, as far as they have a length."""
    lines = [(left, y, right, y)] if left != right else []
    lines += [(x, low, x, high)] if low != high else []
    return Markup("").join(tag("line", x1=a, y1=b, x2=c, y2=d, class_=f"bar {style}") for a, b, c, d in lines)


def draw_tradeoff(compiled: TableData) -> Markup:
    """Draw target accuracy over retention with cost as size and the Pareto front; empty without such rows."""
    seen = compute_tradeoff(compiled)
    if not seen.places:
        return Markup("")
    errors = {place.index: (spread(place.retention.std), spread(place.target.std)) for place in seen.places}
    kept = [place.retention.mean + sign * errors[place.index][0] for place in seen.places for sign in (-1, 1)]
    target = [place.target.mean + sign * errors[place.index][1] for place in seen.places for sign in (-1, 1)]
    x, y = fit([*kept, 0.0], LEFT, RIGHT), fit(target, BOTTOM, TOP)
    others, adapted = collect_sides(compiled)
    across = f"Retention: change on {others or 'the other domains'} (points)"
    up = f"Target accuracy: {adapted or 'what a row is adapted to'} (%)"
    parts = [*frame(x, y, across, up), tag("line", x1=x(0.0), x2=x(0.0), y1=TOP, y2=BOTTOM, class_="zero")]
    if seen.front:
        (left, height), *rest = seen.front
        steps = "".join(f"V{y(accuracy)}H{x(retention)}" for retention, accuracy in rest)
        parts.append(tag("path", d=f"M{LEFT} {y(height)}H{x(left)}{steps}V{BOTTOM}", class_="front"))
    for place in sorted(seen.places, key=lambda place: -place.cost):
        across_error, up_error = errors[place.index]
        here, there = place.retention.mean, place.target.mean
        ends = (x(here - across_error), x(here + across_error), y(there - up_error), y(there + up_error))
        inside = (
            tag("title", describe(place, seen.measure)),
            bars(x(here), y(there), *ends, colour(place.index)),
            mark(place.index, x(here), y(there), 5 + 6 * seen.size(place), filled=place.best),
        )
        parts.append(tag("g", *inside))
    keys = [legend_item(place.line.label, mark(place.index, 9, 9, 6, filled=place.best)) for place in seen.places]
    picture = drawing(f"{compiled.table.title}: target accuracy, retention and cost", *parts)
    return chart(picture, keys, seen.legend)


def spread(std: float) -> float:
    """Return a standard deviation, or 0 with a single seed."""
    return 0.0 if math.isnan(std) else std


def describe(place: Place, measure: str) -> str:
    """Say where a row stands."""
    kept, target = place.retention.text(signed=True), place.target.text()
    return f"{place.line.label}: target {target} %, retention {kept}, {place.cost:,.4g} {MEASURES[measure]}"


def chart(picture: Markup, keys: Sequence[Markup], caption: str = "") -> Markup:
    """Put a drawing together with its legend and caption."""
    below = [tag("figcaption", caption)] if caption else []
    return tag("figure", picture, tag("ul", *keys, class_="legend") if keys else Markup(""), *below, class_="chart")


def legend_item(label: str, sample: Markup) -> Markup:
    """Return a line of a legend."""
    return tag("li", tag("svg", sample, viewBox="0 0 18 18", aria_hidden="true"), label)


def draw_lines(title: str, series: Sequence[Series], across: str, up: str, *, log: bool = False) -> Markup:
    """Draw lines over a common axis; empty without a point that can be placed on it."""
    drawn = [(index, each) for index, each in enumerate(series) if each.points]
    places = [x for _, each in drawn if not each.level for x, _, _ in each.points]
    if not places:
        return Markup("")
    heights = [y + sign * bar for _, each in drawn for _, y, bar in each.points for sign in (-1, 1)]
    x, y = fit(places, LEFT, RIGHT, log=log), fit(heights, BOTTOM, TOP)
    parts = frame(x, y, across, up)
    for index, each in drawn:
        parts.append(draw_series(index, each, x, y))
    several = len(drawn) > 1
    keys = [legend_item(each.label, sample(index, each)) for index, each in drawn] if several else []
    return chart(drawing(title, *parts), keys)


def draw_series(index: int, series: Series, x: Scale, y: Scale) -> Markup:
    """Draw one line, its bars and its marks."""
    dashes = DASHES[index % len(DASHES)]
    if series.level:
        height = y(series.points[0][1])
        path = f"M{LEFT} {height}H{RIGHT}"
    else:
        path = "M" + "L".join(f"{x(at)} {y(value)}" for at, value, _ in series.points)
    parts = [tag("title", series.label), tag("path", d=path, class_=f"line {colour(index)}", stroke_dasharray=dashes)]
    if not series.level:
        for at, value, bar in series.points:
            parts.append(bars(x(at), y(value), 0, 0, y(value - bar), y(value + bar), colour(index)))
            if series.marked:
                parts.append(mark(index, x(at), y(value), 5))
    return tag("g", *parts)


def sample(index: int, series: Series) -> Markup:
    """Return a line's key in a legend."""
    dashes = DASHES[index % len(DASHES)]
    line = tag("path", d="M0 9H18", class_=f"line {colour(index)}", stroke_dasharray=dashes)
    return line + mark(index, 9, 9, 5) if series.marked and not series.level else line


def draw_panel(compiled: TableData, panel: Curves) -> Markup:
    """Draw one panel of a table's curves; empty without a point."""
    series = []
    for label in panel.lines:
        cells = [(x, row.cell(panel.column)) for x, row in collect_points(compiled, panel, label).items()]
        series.append(Series(label, [(x, cell.mean, spread(cell.std)) for x, cell in cells if cell is not None]))
    return draw_lines(panel.title, series, AXES[panel.x], f"{panel.title}: {panel.column.capitalize()} (%)", log=True)


def draw_gates(line: RowResult) -> Markup:
    """Draw the mean gate weights of a row: branches by domain over blocks; empty without gates."""
    if not line.gates:
        return Markup("")
    wide, high = CELL
    blocks = len(next(iter(line.gates.values())))
    left, y = 150.0, 24.0
    heads = [
        tag("text", f"block {number}", x=left + (number + 0.5) * wide, y=16, class_="tick", text_anchor="middle")
        for number in range(blocks)
    ]
    parts: list[Markup] = heads
    for domain, weights in line.gates.items():
        for index, branch in enumerate(line.branches):
            parts.append(tag("text", f"{domain}: {branch}", x=left - 8, y=y + 15, class_="tick", text_anchor="end"))
            for number, block in enumerate(weights):
                parts.append(heat(block[index], left + number * wide, y))
            y += high
        y += 6
    picture = drawing(f"Mean gates of {line.label}", *parts, width=left + blocks * wide + 4, height=y)
    return tag("figure", picture, tag("figcaption", line.label), class_="chart heat")


def heat(weight: float, x: float, y: float) -> Markup:
    """Draw one cell of a heat map."""
    wide, high = CELL
    box = tag("rect", x=x, y=y, width=wide - 1, height=high - 1, class_="heat", fill_opacity=f"{weight:.3f}")
    style = "value strong" if weight > 0.65 else "value"
    return box + tag("text", f"{weight:.2f}", x=x + wide / 2, y=y + 15, class_=style, text_anchor="middle")


def polygon(corners: int, turn: float = 0.0, inner: float = 1.0) -> str:
    """Return the outline of a regular polygon, or of a star whose inner corners lie at a smaller radius."""
    turns = [turn - 0.25 + number / corners for number in range(corners)]
    radii = [1.0 if inner == 1.0 or number % 2 == 0 else inner for number in range(corners)]
    at = [(r * math.cos(2 * math.pi * t), r * math.sin(2 * math.pi * t)) for r, t in zip(radii, turns, strict=True)]
    return "M" + "L".join(f"{a:.3f} {b:.3f}" for a, b in at) + "Z"


CROSS = "M-.35-1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35Z"


SHAPES: Mapping[str, str] = {
    "cross": CROSS,
    "circle": "M1 0A1 1 0 1 1-1 0A1 1 0 1 1 1 0Z",
    "square": "M-.85-.85H.85V.85H-.85Z",
    "triangle": polygon(3),
    "upside down triangle": polygon(3, 0.5),
    "diamond": polygon(4),
    "star": polygon(10, inner=0.45),
    "pentagon": polygon(5),
    "hexagon": polygon(6),
    "saltire": polygon(8, 0.125, inner=0.4),
}
"""Outlines of the marks, of radius 1."""


def shapes() -> Markup:
    """Return the definitions of the marks, once for a page."""
    thin = {"vector_effect": "non-scaling-stroke"}  # the line around a mark does not grow with it
    paths = [tag("path", id=f"mark{number}", d=path, **thin) for number, path in enumerate(SHAPES.values())]
    return tag("svg", tag("defs", *paths), width=0, height=0, class_="shapes", aria_hidden="true")
