"""mode prune."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cli.options import ConfOption, Overrides, reporting_errors, runs_folder


def prune(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run's id or the start of it.")],
    overrides: Overrides = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option("--ratio", min=0.0, max=1.0, help="Share of a layer's experts that go; repeat it."),
    ] = None,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="Order: change, norm, usage or random; repeat it. Default: all.")
    ] = None,
    conf: ConfOption = None,
) -> None:
    """Take experts out of a finished run, those that are needed least by an order, and score what is left.

    Example: mode prune 3f2a90c1d2e4 --ratio 0.25 --ratio 0.5 --by change
    """
    with reporting_errors():
        from cli.report import results_folder
        from mode.artefacts.find import find_run
        from mode.artefacts.prune import ORDERS, render_pruned
        from mode.artefacts.prune import prune as measure
        from mode.core.errors import ConfigError, suggest

        orders = by or list(ORDERS)
        for order in orders:
            if order not in ORDERS:
                raise ConfigError(f"--by {order}: not one of {', '.join(ORDERS)}{suggest(order, ORDERS)}")
        given = list(overrides or [])
        recalled = find_run(run, runs_folder(given, conf))
        ratios = ratio or [0.25, 0.5, 0.75]
        results = results_folder(given, conf)

        def tell(text: str) -> None:
            print(text, file=sys.stderr)

        found, path = measure(recalled, ratios, orders, results, tell, conf)
        print(render_pruned([found])["md"], end="")
        print(f"written to {path}; `mode report pruning` renders all", file=sys.stderr)
