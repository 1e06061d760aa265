"""Figures of benchmarks: how a step grows, and layouts of several processes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mode.bench.ratios import Ratio, compute_ratio
from mode.charts.chart import Axis, Chart, Panel, Point, Series, Style
from mode.charts.draw import write_chart

BROKEN = (4.0, 2.0)
"""Dashes of what was computed and not measured."""


SCALE_COLOURS = ("blue", "orange")
"""Of a step as it is, and of one whose gates leave branches out."""


VARIANT = re.compile(r"(\w) = (\d+)(?:, (.+))?")


def chart_scale(cases: Sequence[Mapping[str, Any]]) -> Chart:
    """Describe a record's cases: a panel for every quantity, points as measured, a broken line for operations.

    Args:
        cases: As a benchmark's record has them: job, variant, operations, and seconds by round.
    """
    jobs: dict[str, list[tuple[re.Match[str], Mapping[str, Any]]]] = {}
    for case in cases:
        if match := VARIANT.fullmatch(case["variant"]):
            jobs.setdefault(case["job"], []).append((match, case))
    panels = []
    for job, found in jobs.items():
        (first, base), *_ = found
        series = []
        for kind, colour in zip(dict.fromkeys(match[3] for match, _ in found), SCALE_COLOURS, strict=False):
            mine = [(int(match[2]), case) for match, case in found if match[3] == kind]
            measured = [make_point(number, compute_ratio(case["seconds"], base["seconds"])) for number, case in mine]
            counted = [Point(number, case["flops"] / base["flops"]) for number, case in mine]
            series.append(Series("", counted, Style(colour, "", line=True, dashes=BROKEN)))
            series.append(Series((kind or "all branches").capitalize(), measured, Style(colour)))
        ticks = sorted({int(match[2]) for match, _ in found})
        x = Axis(f"{first[1]}: {job}", base=2, ticks=ticks)
        panels.append(Panel("", x, Axis("Time of a step, first = 1", low=0.0), series))
    return Chart(
        "Time of a step", panels, columns=3, size=(2.2, 1.9), note="Broken lines: operations. Bars: quartiles."
    )


def make_point(x: float, ratio: Ratio) -> Point:
    """Return a ratio's median with a bar over its quartiles."""
    return Point(x, ratio.median, y_error=(ratio.median - ratio.low, ratio.high - ratio.median))


def draw_scale(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the cases of a scale benchmark."""
    write_chart(chart_scale(cases), path)


LAYOUT_STYLES = (("black", "o"), ("blue", "s"), ("orange", "D"), ("amber", "^"))
"""Of copies, shards, side by side, and that with micro-batches in flight; colours as in the figures of plans."""


JOB = re.compile(r"width (\d+), (\d+) tokens")


PLANNED = ", planned"


def chart_layouts(cases: Sequence[Mapping[str, Any]]) -> Chart:
    """Describe a record's cases: a panel for every width, a line for every layout, a broken one for its plan.

    Args:
        cases: As a benchmark's record has them: job, variant, and seconds by round.
    """
    seconds = {(case["job"], case["variant"]): case["seconds"] for case in cases}
    jobs = {job: tuple(map(int, match.groups())) for job, _ in seconds if (match := JOB.fullmatch(job))}
    first, *rest = dict.fromkeys(variant for _, variant in seconds)
    layouts = [variant for variant in rest if not variant.endswith(PLANNED)]
    panels = []
    for width in sorted({width for width, _ in jobs.values()}):
        mine = sorted((tokens, job) for job, (own, tokens) in jobs.items() if own == width)
        series = []
        for layout, (colour, marker) in zip(layouts, LAYOUT_STYLES, strict=False):
            speeds = [make_point(x, compute_ratio(seconds[job, first], seconds[job, layout])) for x, job in mine]
            plans = [compute_ratio(seconds[job, first], seconds[job, layout + PLANNED]).median for _, job in mine]
            planned = [Point(x, speed) for (x, _), speed in zip(mine, plans, strict=True)]
            series.append(Series("", planned, Style(colour, "", line=True, dashes=BROKEN)))
            series.append(Series(layout.capitalize(), speeds, Style(colour, marker, line=True)))
        x, y = Axis("Tokens of a step", base=2, ticks=[tokens for tokens, _ in mine]), Axis("Speed, one process = 1")
        panels.append(Panel(f"Width {width}", x, y, series, unity=1.0))
    note = "Broken lines: planned. Bars: quartiles."
    return Chart("Speed of layouts", panels, columns=3, size=(2.8, 2.4), note=note)


def draw_layouts(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the cases of a sharding benchmark."""
    write_chart(chart_layouts(cases), path)
