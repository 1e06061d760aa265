"""mode bench."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cli.options import ConfOption, Overrides, reporting_errors, with_method


def bench(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE",
            help="step, loops, options, branches, scale, loss, data, sharding, eval, generate, edge, startup.",
        ),
    ],
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that everything is measured, in turn.")] = 9,
    conf: ConfOption = None,
) -> None:
    """Measure speed and size as ratios of variants that are timed in turn, and keep the figures.

    Example: mode bench edge backbone=smollm2-135m
    """
    with reporting_errors():
        from mode.bench.records import render_section
        from mode.bench.run import run_suite
        from mode.config.compose import compose

        run = compose(with_method(overrides or [], "mode", "mode bench", conf), conf)

        def done(number: int) -> None:
            print(f"round {number} of {rounds}" if number else "warmed up", file=sys.stderr)

        benchmark, path = run_suite(suite, run, rounds, done)
        print(render_section(benchmark), end="")
        print(f"written to {path}; `mode report bench` renders all", file=sys.stderr)
