"""Figures of benchmarks: how a step grows, and layouts of several processes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mode.bench.timing import compute_ratio

SCALE_SHADES = ("#0072b2", "#d55e00")
"""Of a step as it is, and of one whose gates leave branches out."""


VARIANT = re.compile(r"(\w) = (\d+)(?:, (.+))?")


def draw_scale(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a record's cases: a panel for every quantity, points for what was measured, a broken line for operations.

    Args:
        cases: As a benchmark's record has them: job, variant, operations, and seconds by round.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    jobs: dict[str, list[tuple[re.Match[str], Mapping[str, Any]]]] = {}
    for case in cases:
        if match := VARIANT.fullmatch(case["variant"]):
            jobs.setdefault(case["job"], []).append((match, case))
    figure, panels = pyplot.subplots(1, len(jobs), figsize=(2.6 * len(jobs), 3.4), squeeze=False)
    for (job, found), panel in zip(jobs.items(), panels.flat, strict=True):
        (first, base), *_ = found
        for kind, shade in zip(dict.fromkeys(match[3] for match, _ in found), SCALE_SHADES, strict=False):
            mine = [(int(match[2]), case) for match, case in found if match[3] == kind]
            numbers = [number for number, _ in mine]
            times = [compute_ratio(case["seconds"], base["seconds"]) for _, case in mine]
            spread = [[one.median - one.low for one in times], [one.high - one.median for one in times]]
            panel.errorbar(
                numbers,
                [one.median for one in times],
                spread,
                color=shade,
                fmt="o",
                markersize=4,
                capsize=2,
                label=kind or "all branches",
            )
            told = [case["flops"] / base["flops"] for _, case in mine]
            panel.plot(numbers, told, "--", color=shade, linewidth=1.0)
        panel.set_xscale("log", base=2)
        panel.set_xticks([int(match[2]) for match, _ in found], [match[2] for match, _ in found], fontsize=7)
        panel.minorticks_off()
        panel.set_ylim(bottom=0.0)
        panel.set_xlabel(f"{first[1]}: {job}", fontsize=9)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    figure.supylabel("Time of a step (broken lines: operations)", fontsize=9)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


LAYOUT_SHADES = ("#444444", "#0072b2", "#d55e00", "#e69f00")
"""Of copies, shards, side by side, and that with micro-batches in flight; as in the figures of plans."""


JOB = re.compile(r"width (\d+), (\d+) tokens")


PLANNED = ", planned"


def draw_layouts(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a record's cases: a panel for every width, a line for every layout, a broken one for its plan.

    Args:
        cases: As a benchmark's record has them: job, variant, and seconds by round.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds = {(case["job"], case["variant"]): case["seconds"] for case in cases}
    jobs = {job: tuple(map(int, match.groups())) for job, _ in seconds if (match := JOB.fullmatch(job))}
    first, *rest = dict.fromkeys(variant for _, variant in seconds)
    layouts = [variant for variant in rest if not variant.endswith(PLANNED)]
    widths = sorted({width for width, _ in jobs.values()})
    figure, panels = pyplot.subplots(1, len(widths), figsize=(3.8 * len(widths), 3.6), sharey=True, squeeze=False)
    for width, panel in zip(widths, panels.flat, strict=True):
        mine = sorted((tokens, job) for job, (own, tokens) in jobs.items() if own == width)
        tokens = [count for count, _ in mine]
        for layout, shade in zip(layouts, LAYOUT_SHADES, strict=False):
            found = [compute_ratio(seconds[job, first], seconds[job, layout]) for _, job in mine]
            told = [compute_ratio(seconds[job, first], seconds[job, layout + PLANNED]) for _, job in mine]
            middle = [one.median for one in found]
            spread = [[one.median - one.low for one in found], [one.high - one.median for one in found]]
            panel.errorbar(tokens, middle, spread, color=shade, marker="o", markersize=3, capsize=2, label=layout)
            panel.plot(tokens, [one.median for one in told], "--", color=shade, linewidth=1.0)
        panel.axhline(1.0, color="#999999", linewidth=0.6)
        panel.set_xscale("log", base=2)
        panel.set_title(f"width {width}", fontsize=9)
    figure.supxlabel("Tokens of a step (broken lines: planned)", fontsize=9)
    figure.supylabel("Speed, one process = 1", fontsize=9)
    handles, titles = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside upper center", ncols=2, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
