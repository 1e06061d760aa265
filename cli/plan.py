"""mode plan."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import ConfOption, Overrides, complete, told, with_method

if TYPE_CHECKING:
    from mode.config.run import Run
    from mode.planning.machine import Device

DRAWN = ("llama-1b", "llama-8b", "llama-70b")
LINKS = ("nvlink", "ib", "ethernet")


def plan(
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="Number of devices, D.")] = 8,
    device: Annotated[str, typer.Option("--device", help="What they are.", autocompletion=complete("device"))] = "h100",
    link: Annotated[
        str, typer.Option("--link", help="What connects them.", autocompletion=complete("link"))
    ] = "nvlink",
    curves: Annotated[
        Path | None, typer.Option("--curves", help="Draw 1B to 70B on three links, to 4,096 devices, into a folder.")
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option("--calibrate", help="Measure this machine, and call it so in the folder of --conf.")
    ] = None,
    conf: ConfOption = None,
) -> None:
    """Predict a training step on many devices: copies (ddp), shards (fsdp), or branches side by side (mpmd).

    A step has train.batch_size rows of train.sequence_length tokens. Devices and links are YAMLs, also of your own, and
    `--calibrate NAME --conf FOLDER` writes them of two processes of this machine's processor.

    Example: mode plan backbone=llama-8b train.batch_size=64 train.sequence_length=4096 --devices 16 --link ib
    """
    with told():
        from mode.config.compose import compose
        from mode.planning.machine import Device, Link, read
        from mode.planning.plan import estimates, verdict
        from mode.planning.work import work_of

        def composed(*more: str) -> Run:
            given = [*(overrides or []), *more]
            if not any(text.startswith(("method=", "experiment=")) for text in given):
                given = with_method([*given, "method.start=fresh", "method.num_experts=1"], "mode", "mode plan", conf)
            return compose(given, conf)

        if calibrate is not None:
            measure(composed(), conf, calibrate)
            return
        if curves is not None:
            draw(composed, read(Device, "device", device, conf), curves, conf)
            return
        run = composed()
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


def measure(run: Run, conf: Path | None, name: str) -> None:
    """Measure this machine for plans."""
    from mode.bench.suites.sharding import calibrated
    from mode.core.errors import ConfigError
    from mode.methods.mode import MoDE

    if conf is None:
        raise ConfigError(f"--calibrate {name} needs --conf FOLDER, where the YAMLs of device and link go")
    if not isinstance(run.method, MoDE):
        raise ConfigError("--calibrate measures a model with experts: it goes with method=mode")
    for path in calibrated(run, run.method, conf, name):
        print(path.read_text("utf-8"), end="")
        print(f"written to {path}; `--device {name} --link {name} --conf {conf}` plans with it", file=sys.stderr)


def draw(composed: Callable[..., Run], device: Device, folder: Path, conf: Path | None) -> None:
    """Draw what is planned for backbones of three sizes on three links."""
    from mode.planning.machine import Link, read
    from mode.planning.work import work_of
    from mode.report.plan_figures import publish

    works = {name: work_of(composed(f"backbone={name}", "train.sequence_length=4096")) for name in DRAWN}
    for path in publish(works, {name: read(Link, "link", name, conf) for name in LINKS}, device, folder):
        print(f"written to {path}", file=sys.stderr)
