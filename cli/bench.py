"""Command `mode bench`: measure speed and size, and write a record."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cli.options import ConfOption, Overrides, add_method, reporting_errors


def bench(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE",
            help="step, loops, options, branches, scale, loss, data, sharding, eval, generate, inference, startup.",
        ),
    ],
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds. Every variant is timed once per round.")] = 9,
    conf: ConfOption = None,
) -> None:
    """Measure speed and size of variants.

    The variants are timed in turn and compared by ratios. The results are written as a record.

    Example: mode bench inference backbone=smollm2-135m
    """
    with reporting_errors():
        from mode.bench.records import render_section
        from mode.bench.run import run_suite
        from mode.config.compose import compose

        run = compose(add_method(overrides or [], "mode", "mode bench", conf), conf)

        def done(number: int) -> None:
            print(f"round {number} of {rounds}" if number else "warmed up", file=sys.stderr)

        benchmark, path = run_suite(suite, run, rounds, done)
        print(render_section(benchmark), end="")
        print(f"written to {path}; `mode report bench` renders all", file=sys.stderr)
