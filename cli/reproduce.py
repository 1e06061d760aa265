"""Command `mode reproduce`: execute every run of a table, and render it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import ConfOption, Overrides, complete, reporting_errors, take_list
from cli.report import PUBLISHED, find_results_folder
from mode.core.files import expand_home

if TYPE_CHECKING:
    from mode.config.run import Run
    from mode.launch.limit import TimeLimit
    from mode.launch.schedule import Outcome, Start


DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
"""Hours, minutes and seconds, each of which may be left out."""


UNITS = (3600, 60, 1)
"""Seconds of each of them."""


def reproduce(
    table: Annotated[str, typer.Argument(help="Table to reproduce.", autocompletion=complete("table"))],
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Runs at a time; 0: by cores, or one on a GPU.")] = 0,
    launcher: Annotated[
        str, typer.Option("--launcher", help="Launcher of the runs.", autocompletion=complete("launcher"))
    ] = "local",
    within: Annotated[
        str | None,
        typer.Option("--within", metavar="TIME", help="End within this time, such as 9m; the next call goes on."),
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option("--row", metavar="NAME", help="Row to execute, in place of all; repeatable, in this order."),
    ] = None,
    conf: ConfOption = None,
) -> None:
    """Execute every run of a table, then render the table.

    Finished runs are skipped. A run whose process dies is restarted from its checkpoint. A run that fails is reported,
    and the others continue. With --within, runs of this machine end at a checkpoint before the time is up; jobs of a
    launcher are cancelled then. Rendering comes after it. The time that the runs
    will take is estimated from published runs.

    Examples: mode reproduce table1 seeds=[0,1,2]; mode reproduce table1 --within 1h30m; mode reproduce table1 --row sft
    """
    with reporting_errors():
        limit = read_limit(within)  # before the imports, which take seconds

        from cli.progress import make_display
        from mode.launch.schedule import run_all
        from mode.launch.table_runs import compose_table

        given, seeds = take_list(overrides or [], "seeds")
        runs = compose_table(table, seeds, given, conf, row or [])
        start, retries = choose_starter(launcher, runs, conf)
        with make_display() as display:
            together = jobs or count_jobs(runs)
            outcome = run_all(
                runs,
                jobs=together,
                display=display,
                start=start,
                retries=retries,
                limit=limit,
                announce=partial(announce_duration, jobs=together),
            )
        report_outcome(table, given, conf, outcome)


def announce_duration(runs: Sequence[Run], jobs: int) -> None:
    """Print the number of runs to execute and, if published records tell, about how long they take."""
    from cli.progress import format_roughly
    from mode.core.errors import ConfigError
    from mode.launch.duration import estimate_duration
    from mode.records.record import read_records

    try:
        found = estimate_duration(runs, read_records(PUBLISHED), jobs) if runs else None
    except ConfigError:
        found = None  # a damaged published record, which no run needs
    if found is None:
        return
    several = "s" if found.runs > 1 else ""
    together = f", {jobs} at a time" if jobs > 1 else ""
    unknown = f" and {found.unknown} that no record tells of" if found.unknown else ""
    print(
        f"{found.runs} run{several} to execute{together}: about {format_roughly(found.seconds)}{unknown}, at the speed "
        f"of the published runs ({found.processor})",
        file=sys.stderr,
    )


def read_limit(text: str | None) -> TimeLimit | None:
    """Return the time limit of `--within`; None without it.

    Raises:
        ConfigError: The text is not a time.
    """
    from mode.core.errors import ConfigError
    from mode.launch.limit import TimeLimit

    if text is None:
        return None
    match = DURATION.fullmatch(text)
    seconds = sum(int(value or 0) * unit for value, unit in zip(match.groups(), UNITS, strict=True)) if match else 0
    if not seconds:
        raise ConfigError(f"--within {text}: not a time such as 90s, 9m or 1h30m")
    return TimeLimit.after(seconds)


def choose_starter(name: str, runs: Sequence[Run], conf: Path | None) -> tuple[Start | None, int]:
    """Return the function that starts a run, None for local processes, and the number of restarts."""
    from mode.launch.launchers import make_starter, read_launcher

    launcher = read_launcher(name, conf)
    if launcher.kind == "local":
        return None, launcher.retries
    return make_starter(launcher, expand_home(runs[0].paths.runs) / "jobs"), launcher.retries


def report_outcome(table: str, overrides: Sequence[str], conf: Path | None, outcome: Outcome) -> None:
    """Print the number of runs, the failures and what is left, and render the table of the finished runs.

    Raises:
        ConfigError: No run succeeded.
    """
    from mode.core.errors import ConfigError
    from mode.report.render import report as render_report

    print(f"{outcome.executed} runs executed, {outcome.skipped} existed, {len(outcome.failed)} failed", file=sys.stderr)
    for run_id, error in outcome.failed.items():
        print(f"  {run_id}: {error}", file=sys.stderr)
    if outcome.left:
        print(f"the time is up: {outcome.left} runs are left; the same command goes on", file=sys.stderr)
        if not outcome.executed and not outcome.skipped:
            return  # there is nothing to render
    if outcome.failed and not outcome.executed and not outcome.skipped:
        raise ConfigError("no run succeeded")
    text, path = render_report(
        table, find_results_folder(overrides, conf), overrides, conf, write=True if outcome.executed else None
    )
    print(text)
    print(f"written to {path} with .tex, .csv and .png beside it", file=sys.stderr)
    if outcome.failed:
        raise typer.Exit(1)


def count_jobs(runs: Sequence[Run]) -> int:
    """Return the number of runs at a time: one on a GPU, else the number of cores over the threads of a run."""
    if any(run.train.device != "cpu" for run in runs) and has_accelerator():
        return 1
    return max(1, (os.cpu_count() or 1) // max(run.train.threads for run in runs))


def has_accelerator() -> bool:
    """Return whether this machine has a CUDA device."""
    from mode.core.device import has_cuda

    return has_cuda()
