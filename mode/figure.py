"""The figure beside a table: target accuracy against retention, one point per row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mode.compiled import Compiled

COLOURS = ("#444444", "#d55e00", "#e69f00", "#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#6a3d9a", "#b15928", "#a6761d")
MARKERS = "Xosv^DPp*h"


def draw(compiled: Compiled, path: Path) -> None:
    """Draw every row that has both a target accuracy and a retention, with standard deviations over seeds.

    Args:
        compiled: The compiled table.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    for index, line in enumerate(compiled.lines):
        retention, target = line.cell("retention"), line.cell("target")
        if retention is None or target is None:
            continue
        several = target.n > 1
        axes.errorbar(
            retention.mean,
            target.mean,
            xerr=retention.std if several else None,
            yerr=target.std if several else None,
            fmt=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            markersize=8,
            capsize=3,
            label=line.label,
        )
    others = [name.capitalize() for name in compiled.domains if name not in compiled.targets]
    axes.axvline(0, color="#bbbbbb", linewidth=1, zorder=0)
    axes.set_xlabel(f"Retention: change of {' and '.join(others)} accuracy against the backbone (points)")
    axes.set_ylabel(f"Target accuracy: mean of {' and '.join(name.capitalize() for name in compiled.targets)} (%)")
    axes.set_title(compiled.table.title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="best")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)
