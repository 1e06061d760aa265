"""Planned steps over the tokens of a device, for backbones and links: a table, and figures of time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import pandas as pd

from mode.planning.machine import Device, Link
from mode.planning.plan import estimate_layouts
from mode.planning.work import Work, scale_tokens
from mode.report.figures import COLOURS

TOKENS = tuple(2**power for power in range(7, 17))
"""Tokens of a step for each device."""


DEVICES = (8, 64, 512, 4096)


SHADES = {"ddp": COLOURS[0], "fsdp": COLOURS[4], "mpmd": COLOURS[1]}


NAMES = {"ddp": "copies (DDP)", "fsdp": "in shards (FSDP)", "mpmd": "side by side (MPMD)"}


def plan_points(works: Mapping[str, Work], links: Mapping[str, Link], device: Device) -> pd.DataFrame:
    """Plan every backbone on every link, by number of devices and tokens of each.

    Args:
        works: A step of each backbone, of any number of tokens.
        links: What connects devices.
        device: What they are.

    Returns:
        A row for every layout: backbone, link, devices, tokens of a device, layout, ms of a step, GB that a device
        holds and sends, whether it fits, placement and micro-batches.
    """
    rows = [
        {
            "backbone": backbone,
            "link": link,
            "devices": count,
            "tokens": tokens,
            "layout": one.layout,
            "ms": round(1e3 * one.seconds, 3),
            "holds_gb": round(one.memory / 1e9, 3),
            "sends_gb": round(one.traffic / 1e9, 3),
            "fits": one.memory <= device.memory,
            "placement": one.placement,
            "micro": one.micro,
        }
        for backbone, link, count, tokens in product(works, links, DEVICES, TOKENS)
        for one in estimate_layouts(scale_tokens(works[backbone], tokens * count), count, device, links[link])
    ]
    return pd.DataFrame(rows)


def draw_plan(found: pd.DataFrame, column: str, label: str, devices: Sequence[int], path: Path) -> None:
    """Draw a quantity over the tokens of a device: a panel for every backbone and link, a line for every layout.

    Args:
        found: What `plan_points` returns.
        column: The quantity.
        label: What it is called.
        devices: Two numbers of devices: a solid line and a broken one.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    backbones, links = (list(dict.fromkeys(found[name])) for name in ("backbone", "link"))
    figure, panels = pyplot.subplots(
        len(backbones), len(links), figsize=(3.4 * len(links), 2.6 * len(backbones)), sharex=True, squeeze=False
    )
    for (backbone, link), panel in zip(product(backbones, links), panels.flat, strict=True):
        here = found[(found["backbone"] == backbone) & (found["link"] == link)]
        for layout, count in product(NAMES, devices):
            mine = here[(here["layout"] == layout) & (here["devices"] == count)]
            title, style = f"{NAMES[layout]}, {count:,} devices", ("-", "--")[devices.index(count)]
            panel.plot(mine["tokens"], mine[column], style, color=SHADES[layout], linewidth=1.2, label=title)
            out = mine[~mine["fits"]]
            panel.plot(out["tokens"], out[column], "x", color=SHADES[layout], markersize=4)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_title(f"{backbone}, {link}", fontsize=9)
    figure.supxlabel("Tokens of a step for each device (crosses: more than a device holds)", fontsize=9)
    figure.supylabel(label, fontsize=9)
    handles, titles = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside upper center", ncols=3, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def write_plan(works: Mapping[str, Work], links: Mapping[str, Link], device: Device, folder: Path) -> list[Path]:
    """Write `plan.csv` and its figures into a folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = plan_points(works, links, device)
    paths = [folder / name for name in ("plan.csv", "plan-time.png", "plan-memory.png")]
    found.to_csv(paths[0], index=False)
    draw_plan(found, "ms", "Milliseconds of a step", (64, 4096), paths[1])
    draw_plan(found, "holds_gb", "GB that a device holds", (64, 4096), paths[2])
    return paths
