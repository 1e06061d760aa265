"""Command `mode plan`: predict a training step on many devices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import ConfOption, Overrides, add_method, complete, reporting_errors

if TYPE_CHECKING:
    from mode.config.run import Run
    from mode.planning.machine import Device

DRAWN = ("llama-1b", "llama-8b", "llama-70b")
"""Backbones of the figures."""


LINKS = ("nvlink", "ib", "ethernet")
"""Links of the figures."""


def plan(
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="Number of devices, D.")] = 8,
    device: Annotated[
        str, typer.Option("--device", help="Kind of device.", autocompletion=complete("device"))
    ] = "h100",
    link: Annotated[
        str, typer.Option("--link", help="Link between the devices.", autocompletion=complete("link"))
    ] = "nvlink",
    curves: Annotated[
        Path | None,
        typer.Option(
            "--curves",
            help="Folder for figures: 1B to 70B parameters, three links, up to 4,096 devices.",
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option("--calibrate", help="Measure this machine; name of the device and link to write to --conf."),
    ] = None,
    conf: ConfOption = None,
) -> None:
    """Predict a training step on many devices.

    The layouts are DDP, FSDP and MPMD (branches on devices of their own). A step has train.batch.size rows of
    train.sequence_length tokens. Devices and links are YAML files, and your own folder may add some.
    `--calibrate NAME --conf FOLDER` measures two processes on this machine's CPU and writes both.

    Example: mode plan backbone=llama-8b train.batch.size=64 train.sequence_length=4096 --devices 16 --link ib
    """
    with reporting_errors():
        from mode.config.compose import compose
        from mode.planning.machine import Device, Link, read_machine
        from mode.planning.plan import estimate_layouts, summarise_estimates
        from mode.planning.work import describe_work

        def compose_modular(*more: str) -> Run:
            given = [*(overrides or []), *more]
            if not any(text.startswith(("method=", "experiment=")) for text in given):
                given = add_method([*given, "method.start=fresh", "method.num_experts=1"], "mode", "mode plan", conf)
            return compose(given, conf)

        if calibrate is not None:
            folder, conf = conf, conf if conf and any(conf.glob("*/*.yaml")) else None  # the folder may be empty yet
            measure(compose_modular(), folder, calibrate)
            return
        if curves is not None:
            draw(compose_modular, read_machine(Device, "device", device, conf), curves, conf)
            return
        run = compose_modular()
        kind, wire = read_machine(Device, "device", device, conf), read_machine(Link, "link", link, conf)
        work = describe_work(run)
        estimates = estimate_layouts(work, devices, kind, wire)
        print(f"{'layout':<8}{'step ms':>10}{'compute ms':>12}{'sends GB':>10}{'holds GB':>10}{'micro':>7}  placement")
        for one in estimates:
            unfit = "" if one.memory <= kind.memory else "  (does not fit)"
            times = f"{1e3 * one.seconds:>10,.1f}{1e3 * one.computing:>12,.1f}"
            sizes = f"{one.traffic / 1e9:>10,.2f}{one.memory / 1e9:>10,.1f}{one.micro:>7}"
            print(f"{one.layout:<8}{times}{sizes}  {one.placement}{unfit}".rstrip())
        print(summarise_estimates(work, estimates, devices, kind))


def measure(run: Run, conf: Path | None, name: str) -> None:
    """Measure this machine and write a device and a link.

    Raises:
        ConfigError: There is no folder for the files, the name is not a name, or the method has no experts.
    """
    from mode.bench.suites.sharding import calibrate as calibrate_machine
    from mode.core.errors import ConfigError
    from mode.core.escape import is_name
    from mode.methods.mode import MoDE

    if conf is None:
        raise ConfigError(f"--calibrate {name} needs --conf FOLDER, the folder for the YAML files of device and link")
    if not conf.is_dir():
        raise ConfigError(f"--conf {conf}: no such folder")
    if not is_name(name):
        raise ConfigError(f"--calibrate {name}: a name has up to 100 letters, digits, - and _")
    if not isinstance(run.method, MoDE):
        raise ConfigError("--calibrate measures a model with experts: choose method=mode")
    for path in calibrate_machine(run, run.method, conf, name):
        print(path.read_text("utf-8"), end="")
        print(f"written to {path}; `--device {name} --link {name} --conf {conf}` uses it", file=sys.stderr)


def draw(compose_run: Callable[..., Run], device: Device, folder: Path, conf: Path | None) -> None:
    """Draw the predictions for backbones of three sizes on three links."""
    from mode.planning.machine import Link, read_machine
    from mode.planning.work import describe_work
    from mode.report.plan_figures import write_plan

    works = {name: describe_work(compose_run(f"backbone={name}", "train.sequence_length=4096")) for name in DRAWN}
    for path in write_plan(works, {name: read_machine(Link, "link", name, conf) for name in LINKS}, device, folder):
        print(f"written to {path}", file=sys.stderr)
