"""Planned steps by tokens per device, for several backbones and links: a table, and figures of time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import pandas as pd

from mode.charts.chart import Axis, Chart, Panel, Point, Series, Style
from mode.charts.draw import write_chart
from mode.planning.machine import Device, Link
from mode.planning.plan import estimate_layouts
from mode.planning.work import Work, scale_tokens

TOKENS = tuple(2**power for power in range(7, 17))
"""Tokens per step and device."""


DEVICES = (8, 64, 512, 4096)
"""Numbers of devices."""


COLOURS = {"ddp": "black", "fsdp": "blue", "mpmd": "orange"}
"""Colours of the layouts, as in the figures of benchmarks."""


NAMES = {"ddp": "copies (DDP)", "fsdp": "in shards (FSDP)", "mpmd": "side by side (MPMD)"}
"""Names of the layouts in figures."""


def plan_points(works: Mapping[str, Work], links: Mapping[str, Link], device: Device) -> pd.DataFrame:
    """Return plans for every backbone, link, number of devices, and number of tokens per device.

    Args:
        works: A step of each backbone, with any number of tokens.
        links: Links between the devices, by name.
        device: Kind of device.

    Returns:
        A row per layout: backbone, link, devices, tokens per device, layout, ms per step, GB that a device holds and
        sends, whether the model fits, placement, and micro-batches.
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


def chart_plan(found: pd.DataFrame, column: str, label: str, devices: Sequence[int]) -> Chart:
    """Return the chart of a quantity over tokens per device: a panel per backbone and link, a line per layout.

    Args:
        found: Plans from `plan_points`.
        column: Column of the quantity.
        label: Name of the quantity.
        devices: Two numbers of devices, for a solid and a dashed line.
    """
    backbones, links = (list(dict.fromkeys(found[name])) for name in ("backbone", "link"))
    panels = []
    for backbone, link in product(backbones, links):
        here = found[(found["backbone"] == backbone) & (found["link"] == link)]
        series = []
        for layout, (count, dashes) in product(NAMES, zip(devices, ((), (4.0, 2.0)), strict=True)):
            mine = here[(here["layout"] == layout) & (here["devices"] == count)]
            style = Style(COLOURS[layout], "", line=True, dashes=dashes)
            series.append(Series(f"{NAMES[layout]}, {count:,} devices", list_points(mine, column), style))
            if out := list_points(mine[~mine["fits"]], column):
                series.append(Series("", out, Style(COLOURS[layout], "x")))
        x, y = Axis("Tokens of a step for each device", base=2), Axis(label, base=10)
        panels.append(Panel(f"{backbone}, {link}", x, y, series))
    note = "Crosses: more memory than a device has."
    return Chart(f"Planned: {label}", panels, columns=len(links), size=(2.6, 2.0), note=note)


def list_points(rows: pd.DataFrame, column: str) -> list[Point]:
    """Return the points of rows: the column over tokens per device."""
    return [Point(float(x), float(y)) for x, y in zip(rows["tokens"], rows[column], strict=True)]


def write_plan(works: Mapping[str, Work], links: Mapping[str, Link], device: Device, folder: Path) -> list[Path]:
    """Write `plan.csv` and its figures into a folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = plan_points(works, links, device)
    paths = [folder / name for name in ("plan.csv", "plan-time.png", "plan-memory.png")]
    found.to_csv(paths[0], index=False)
    write_chart(chart_plan(found, "ms", "Milliseconds of a step", (64, 4096)), paths[1])
    write_chart(chart_plan(found, "holds_gb", "GB that a device holds", (64, 4096)), paths[2])
    return paths
