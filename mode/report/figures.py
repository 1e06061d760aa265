"""The figures beside a table: target accuracy, retention and cost, and what the gates of its modular rows chose."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mode.tables.compile import TableData

COLOURS = ("#444444", "#d55e00", "#e69f00", "#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#6a3d9a", "#b15928", "#a6761d")


MARKERS = "Xosv^DPp*h"


OTHERS = "the other domains'"


AXES = {
    "added": "Added parameters (millions)",
    "examples": "Different rows in the mix",
    "share": "Share of the mix on which the model is held to its backbone",
    "weight": "Weight of the divergence",
}


def draw(compiled: TableData, path: Path) -> None:
    """Draw target accuracy over retention with standard deviations over seeds, cost as area, and the Pareto front.

    Args:
        compiled: The compiled table.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from mode.tables.pareto import collect_sides, compute_tradeoff

    seen = compute_tradeoff(compiled)
    figure, axes = pyplot.subplots(figsize=(7.5, 5.2), layout="constrained")
    for place in seen.places:
        several, colour = place.target.n > 1, COLOURS[place.index % len(COLOURS)]
        axes.errorbar(
            place.retention.mean,
            place.target.mean,
            xerr=place.retention.std if several else None,
            yerr=place.target.std if several else None,
            fmt=MARKERS[place.index % len(MARKERS)],
            color=colour,
            markerfacecolor=colour if place.best else "white",
            markersize=5 + 6 * seen.size(place),
            capsize=3,
            label=place.line.label,
        )
    axes.axvline(0, color="#bbbbbb", linewidth=1, zorder=0)
    axes.plot(
        *zip(*seen.front, strict=True), color="#888888", linewidth=1, dashes=(4, 3), drawstyle="steps-pre", zorder=1
    )
    kept, adapted = collect_sides(compiled)
    axes.set_xlabel(f"Retention: change of {kept or OTHERS} accuracy against the backbone (points)")
    axes.set_ylabel(f"Target accuracy: mean of {adapted or 'what a row is adapted to'} (%)")
    axes.set_title(compiled.table.title)
    if seen.places:
        axes.legend(fontsize=8, loc="best")
        figure.supxlabel(textwrap.fill(seen.legend, 125), fontsize=7, color="#555555")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def draw_curves(compiled: TableData, path: Path) -> None:
    """Draw the panels of a table: a quality over what its rows differ in, with standard deviations over seeds.

    Args:
        compiled: The compiled table.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from mode.tables.findings import collect_points

    panels = compiled.table.curves
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.2), layout="constrained", squeeze=False
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        for index, label in enumerate(panel.lines):
            placed = collect_points(compiled, panel, label)
            cells = [row.cell(panel.column) for row in placed.values()]
            told = [(x, cell) for x, cell in zip(placed, cells, strict=True) if cell is not None]
            style = {"color": COLOURS[index % len(COLOURS)], "label": label}
            if [x for x, _ in told] == [0.0]:  # nothing added: a level to compare with
                axes.axhline(told[0][1].mean, linestyle="--", **style)
                continue
            axes.errorbar(
                [x for x, _ in told],
                [cell.mean for _, cell in told],
                yerr=[cell.std if cell.n > 1 else 0.0 for _, cell in told],
                marker=MARKERS[index % len(MARKERS)],
                capsize=3,
                **style,
            )
        axes.set_xscale("log")
        axes.set_xlabel(AXES[panel.x])
        axes.set_ylabel(f"{panel.column.capitalize()} (%)")
        axes.set_title(panel.title)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


MOST_BRANCHES = 8
"""Branches of a row whose weights are drawn one by one; records have those of all."""


def draw_gates(compiled: TableData, path: Path) -> bool:
    """Draw a heat map of the mean gate weights for every row with a few branches: these by domain over blocks.

    Args:
        compiled: The compiled table.
        path: PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    lines = [line for line in compiled.lines if line.gates and len(line.branches) <= MOST_BRANCHES]
    if not lines:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = sum(len(line.branches) for line in lines) * len(compiled.domains)
    figure, grid = pyplot.subplots(
        len(lines),
        1,
        figsize=(6.5, 0.22 * height + 0.8 * len(lines)),
        layout="constrained",
        squeeze=False,
        height_ratios=[len(line.branches) for line in lines],
    )
    for axes, line in zip(grid[:, 0], lines, strict=True):
        rows = [(domain, index, name) for domain in line.gates for index, name in enumerate(line.branches)]
        values = [[weights[index] for weights in line.gates[domain]] for domain, index, _ in rows]
        axes.imshow(values, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
        axes.set_yticks(range(len(rows)), [f"{domain}: {name}" for domain, _, name in rows], fontsize=7)
        axes.set_xticks(range(len(values[0])), [f"block {number}" for number in range(len(values[0]))], fontsize=7)
        axes.set_title(line.label, fontsize=9)
        for row, weights in enumerate(values):
            for column, weight in enumerate(weights):
                colour = "white" if weight > 0.6 else "black"
                axes.text(column, row, f"{weight:.2f}", ha="center", va="center", fontsize=6, color=colour)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    return True
