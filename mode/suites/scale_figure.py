"""The figure of the suite `scale`: the time of a step over what it grows with, beside the closed form's operations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mode.timing import ratio

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
            times = [ratio(case["seconds"], base["seconds"]) for _, case in mine]
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
