"""What charts are drawn on: lines, markers, boxes and texts, on a matplotlib figure or as SVG for a page.

Places are in inches from the upper left corner. What is drawn later covers what was drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from xml.sax.saxutils import escape, quoteattr

from mode.charts.chart import CONTEXT, HEAT, INK, PALETTE, PAPER, RULE, SOFT, Style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.path import Path as Outline

Place = tuple[float, float]


Side = Literal["left", "center", "right"]


POINTS = 72.0
"""Points of an inch."""


RESOLUTION = 150
"""Pixels of a PNG per inch."""


FAMILY = "DejaVu Sans"
"""The font that comes with matplotlib, so that a figure is the same on every machine."""


CLASSES = {
    **{code: f"c{number}" for number, code in enumerate(PALETTE.values())},
    INK: "ink",
    SOFT: "soft",
    RULE: "rule",
    PAPER: "paper",
    CONTEXT: "context",
    HEAT: "hot",
}
"""The class of the page's style sheet for every colour, so that a chart follows light and dark."""


HALVES = ("left", "top", "right", "bottom")
"""Fills of one half of a marker."""


class Sheet(Protocol):
    """What a chart can be drawn on."""

    def line(self, places: Sequence[Sequence[Place]], colour: str, width: float, dashes: Sequence[float] = ()) -> None:
        """Draw lines through places, each a sequence of its own; width and dashes are in points."""

    def mark(self, place: Place, style: Style, radius: float, note: str = "") -> None:
        """Draw a marker of a radius in points; a pointer on it shows the note."""

    def box(self, corner: Place, width: float, height: float, colour: str, opacity: float) -> None:
        """Fill a box with the given upper left corner."""

    def write(self, place: Place, text: str, size: float, colour: str, side: Side, *, bold: bool, turned: bool) -> None:
        """Write a line of text from its baseline, to be read upwards if it is turned."""


def find_colour(style: Style) -> str:
    """Return the colour of a style."""
    return PALETTE[style.colour] if style.colour else CONTEXT


@cache
def measure(text: str, size: float, *, bold: bool = False) -> float:
    """Return the width of a line of text, in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=FAMILY, size=size, weight="bold" if bold else "normal")
    wide, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    return float(wide) / POINTS


@cache
def outline_marker(marker: str, fill: str) -> list[tuple[Outline, str]]:
    """Return the parts of a marker of radius 1, each with what it is filled with: colour, light or paper."""
    from matplotlib.markers import MarkerStyle

    def outline(part: str) -> Outline:
        style: Any = MarkerStyle(marker, fillstyle=part)
        drawn: Outline = style.get_path().transformed(style.get_transform().scale(2.0))
        return drawn

    whole = outline("full")
    if fill in HALVES:
        return [(whole, "paper"), (outline(fill), "colour")]
    return {
        "full": [(whole, "colour")],
        "none": [(whole, "paper")],
        # What lies below does not show through.
        "light": [(whole, "paper"), (whole, "light")],
    }[fill]


class FigureSheet:
    """A matplotlib figure, to be written as PNG or PDF."""

    figure: Figure

    def __init__(self, width: float, height: float) -> None:
        """Make an empty figure, which no window and no global state knows."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.transforms import Affine2D

        self.figure = Figure(figsize=(width, height), dpi=RESOLUTION)
        FigureCanvasAgg(self.figure)
        self.transform = Affine2D().scale(1.0, -1.0).translate(0.0, height) + self.figure.dpi_scale_trans
        self.count = 0

    def add(self, artist: Any) -> None:
        """Put something on top."""
        self.count += 1
        artist.set(zorder=self.count, transform=self.transform, clip_on=False)
        self.figure.add_artist(artist)

    def line(self, places: Sequence[Sequence[Place]], colour: str, width: float, dashes: Sequence[float] = ()) -> None:
        """Draw lines through places."""
        from matplotlib.lines import Line2D

        dashed: Any = (0, tuple(length / width for length in dashes)) if dashes else "-"
        for each in places:
            xs, ys = zip(*each, strict=True)
            self.add(Line2D(xs, ys, color=colour, linewidth=width, linestyle=dashed, dash_capstyle="butt"))

    def mark(self, place: Place, style: Style, radius: float, note: str = "") -> None:
        """Draw a marker."""
        from matplotlib.colors import to_rgba
        from matplotlib.patches import PathPatch
        from matplotlib.transforms import Affine2D

        colour = find_colour(style)
        inside = {"colour": colour, "light": to_rgba(colour, 0.35), "paper": PAPER}
        put = Affine2D().scale(radius / POINTS, -radius / POINTS).translate(*place)
        for outline, fill in outline_marker(style.marker, style.fill):
            width = 0.0 if fill != "paper" and style.fill in HALVES else 1.0
            self.add(PathPatch(outline.transformed(put), facecolor=inside[fill], edgecolor=colour, linewidth=width))

    def box(self, corner: Place, width: float, height: float, colour: str, opacity: float) -> None:
        """Fill a box."""
        from matplotlib.patches import Rectangle

        self.add(Rectangle(corner, width, height, facecolor=colour, alpha=opacity, linewidth=0.0))

    def write(self, place: Place, text: str, size: float, colour: str, side: Side, *, bold: bool, turned: bool) -> None:
        """Write a line of text."""
        from matplotlib.text import Text

        style = {"family": FAMILY, "fontsize": size, "fontweight": "bold" if bold else "normal", "color": colour}
        placed = {"ha": side, "va": "baseline", "rotation": 90.0 if turned else 0.0, "rotation_mode": "anchor"}
        written: Any = Text(*place, text, parse_math=False)
        written.set(**style, **placed)
        self.add(written)

    def save(self, path: Path) -> None:
        """Write the figure in the format of the file's suffix; the same drawing gives the same bytes."""
        import matplotlib

        undated = {".png": {"Software": None}, ".pdf": {"CreationDate": None}}
        with matplotlib.rc_context({"pdf.fonttype": 42}):
            self.figure.savefig(path, dpi=RESOLUTION, metadata=undated[path.suffix])


class SvgSheet:
    """An `svg` element of a page: colours are classes of its style sheet, and nothing has an id."""

    def __init__(self, width: float, height: float) -> None:
        """Make an empty element."""
        self.size = width, height
        self.parts: list[str] = []

    def line(self, places: Sequence[Sequence[Place]], colour: str, width: float, dashes: Sequence[float] = ()) -> None:
        """Draw lines through places."""
        drawn = "".join("M" + "L".join(f"{scale(x)} {scale(y)}" for x, y in each) for each in places)
        dashed = f' stroke-dasharray="{" ".join(f"{length:g}" for length in dashes)}"' if dashes else ""
        self.parts.append(f'<path class="l {CLASSES[colour]}" stroke-width="{width:g}"{dashed} d="{drawn}"/>')

    def mark(self, place: Place, style: Style, radius: float, note: str = "") -> None:
        """Draw a marker."""
        colour = CLASSES[find_colour(style)]
        parts = []
        for outline, fill in outline_marker(style.marker, style.fill):
            bare = " bare" if fill != "paper" and style.fill in HALVES else ""
            path = trace_outline(outline, place, radius)
            parts.append(f'<path class="m {colour} {fill}{bare}" d="{path}"/>')
        title = f"<title>{escape(note)}</title>" if note else ""
        self.parts.append(f"<g>{title}{''.join(parts)}</g>" if note or len(parts) > 1 else parts[0])

    def box(self, corner: Place, width: float, height: float, colour: str, opacity: float) -> None:
        """Fill a box."""
        x, y, wide, high = map(scale, (*corner, width, height))
        shape = f'x="{x}" y="{y}" width="{wide}" height="{high}"'
        self.parts.append(f'<rect class="{CLASSES[colour]}" fill-opacity="{opacity:.2f}" {shape}/>')

    def write(self, place: Place, text: str, size: float, colour: str, side: Side, *, bold: bool, turned: bool) -> None:
        """Write a line of text."""
        x, y = map(scale, place)
        anchor = {"left": "", "center": ' text-anchor="middle"', "right": ' text-anchor="end"'}[side]
        put = f'transform="translate({x} {y})rotate(-90)"' if turned else f'x="{x}" y="{y}"'
        look = f'class="{CLASSES[colour]}{" bold" if bold else ""}" font-size="{size:g}"{anchor}'
        self.parts.append(f"<text {look} {put}>{escape(text)}</text>")

    def render(self, title: str) -> str:
        """Return the element, called by a title."""
        wide, high = map(scale, self.size)
        head = f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label={quoteattr(title)}>'
        return f"{head}<title>{escape(title)}</title>{''.join(self.parts)}</svg>"


def scale(inches: float) -> str:
    """Write a length in points, to a tenth.

    >>> scale(1.0), scale(0.01)
    ('72', '0.7')
    """
    return f"{round(POINTS * inches, 1) + 0.0:.10g}"


def trace_outline(outline: Outline, place: Place, radius: float) -> str:
    """Return the path of a marker in SVG's words."""
    x, y = (POINTS * each for each in place)
    commands = {outline.MOVETO: "M", outline.LINETO: "L", outline.CURVE3: "Q", outline.CURVE4: "C"}
    words = []
    for vertices, code in outline.iter_segments(simplify=False):
        ends = zip(vertices[::2], vertices[1::2], strict=True)
        moved = " ".join(f"{x + radius * a:.1f} {y - radius * b:.1f}" for a, b in ends)
        words.append("Z" if code == outline.CLOSEPOLY else f"{commands[code]}{moved}")
    return "".join(words)
