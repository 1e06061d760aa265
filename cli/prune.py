"""Command `mode prune`: prune experts of a finished run and score the pruned model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cli.options import ConfOption, Overrides, find_runs_folder, reporting_errors


def prune(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run's id or the start of it.")],
    overrides: Overrides = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option("--ratio", min=0.0, max=1.0, help="Share of a layer's experts to prune; repeatable."),
    ] = None,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="Order: change, norm, usage or random; repeatable. Default: all.")
    ] = None,
    conf: ConfOption = None,
) -> None:
    """Prune experts of a finished run, and score the pruned model.

    The least needed experts go first, by one or more orders.

    Example: mode prune 3f2a90c1d2e4 --ratio 0.25 --ratio 0.5 --by change
    """
    with reporting_errors():
        from cli.report import find_results_folder
        from mode.artefacts.find import find_run
        from mode.artefacts.prune import prune as measure
        from mode.artefacts.prune_results import ORDERS, render_pruned
        from mode.core.errors import ConfigError, suggest

        orders = by or list(ORDERS)
        for order in orders:
            if order not in ORDERS:
                raise ConfigError(f"--by {order}: not one of {', '.join(ORDERS)}{suggest(order, ORDERS)}")
        given = list(overrides or [])
        source = find_run(run, find_runs_folder(given, conf))
        ratios = ratio or [0.25, 0.5, 0.75]
        results = find_results_folder(given, conf)

        def report_case(text: str) -> None:
            print(text, file=sys.stderr)

        result, path = measure(source, ratios, orders, results, report_case, conf)
        print(render_pruned([result])["md"], end="")
        print(f"written to {path}; `mode report pruning` renders all", file=sys.stderr)
