"""mode plan."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import ConfOption, Overrides, complete, told, with_method


def plan(
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="Number of devices, D.")] = 8,
    device: Annotated[str, typer.Option("--device", help="What they are.", autocompletion=complete("device"))] = "h100",
    link: Annotated[
        str, typer.Option("--link", help="What connects them.", autocompletion=complete("link"))
    ] = "nvlink",
    conf: ConfOption = None,
) -> None:
    """Predict a training step on many devices: copies (ddp), shards (fsdp), or branches side by side (mpmd).

    A step has train.batch_size rows of train.sequence_length tokens. Devices and links are YAMLs, also of your own.

    Example: mode plan backbone=llama-8b train.batch_size=64 train.sequence_length=4096 --devices 16 --link ib
    """
    with told():
        from mode import config
        from mode.plan import Device, Link, estimates, read, verdict, work_of

        given = list(overrides or [])
        if not any(text.startswith(("method=", "experiment=")) for text in given):
            given = with_method([*given, "method.start=fresh", "method.num_experts=1"], "mode", "mode plan", conf)
        run = config.compose(given, conf)
        kind, wire = read(Device, "device", device, conf), read(Link, "link", link, conf)
        work = work_of(run)
        found = estimates(work, devices, kind, wire)
        print(f"{'layout':<8}{'step ms':>10}{'compute ms':>12}{'sends GB':>10}{'holds GB':>10}{'micro':>7}  placement")
        for one in found:
            full = "" if one.memory <= kind.memory else "  (does not fit)"
            times = f"{1e3 * one.seconds:>10,.1f}{1e3 * one.computing:>12,.1f}"
            sizes = f"{one.traffic / 1e9:>10,.2f}{one.memory / 1e9:>10,.1f}{one.micro:>7}"
            print(f"{one.layout:<8}{times}{sizes}  {one.placement}{full}".rstrip())
        print(verdict(work, found, devices, kind))
