"""Commands `mode show`: methods, domains, backbones, tables, runs, budget and config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import (
    ConfOption,
    DomainOption,
    Overrides,
    add_domains,
    complete,
    find_folder,
    reporting_errors,
    show_config,
)
from mode.core.files import expand_home, find_paths

if TYPE_CHECKING:
    from mode.runs.forecast import Forecast

app = typer.Typer(help="List methods, domains, tables and runs; show budget and config.", no_args_is_help=True)


def print_group(group: str, conf: Path | None, describe: str | None = None) -> None:
    """Print the members of a configuration group, with the text of one setting each."""
    from mode.config.groups import list_members, read_group
    from mode.core.errors import ConfigError

    for name in list_members(group, conf):
        try:
            node = read_group(group, name, conf)
        except ConfigError as error:
            print(f"{name:<16} cannot be used: {error}")
            continue
        about = str(node.get(describe, "")) if describe else ""
        print(f"{name:<16} {about}".rstrip())


@app.command("methods")
def methods(
    overrides: Overrides = None,
    describe: Annotated[
        str | None,
        typer.Option("--describe", help="Method to show with its settings.", autocompletion=complete("method")),
    ] = None,
    conf: ConfOption = None,
) -> None:
    """List the methods by family, with their costs on a backbone; or show one method with its settings.

    Example: mode show methods backbone=llama-135m
    """
    with reporting_errors():
        from mode.report.methods import render_method, render_methods

        given = overrides or []
        print(render_methods(given, conf) if describe is None else render_method(describe, given, conf))


@app.command("domains")
def domains(conf: ConfOption = None) -> None:
    """List the domains."""
    with reporting_errors():
        print_group("domain", conf, "description")


@app.command("backbones")
def backbones(conf: ConfOption = None) -> None:
    """List the backbones."""
    with reporting_errors():
        print_group("backbone", conf, "path")


@app.command("tables")
def tables(conf: ConfOption = None) -> None:
    """List the tables for `mode reproduce`."""
    with reporting_errors():
        print_group("table", conf, "title")


@app.command("runs")
def runs(overrides: Overrides = None, conf: ConfOption = None) -> None:
    """List the finished and the interrupted runs."""
    with reporting_errors():
        from mode.config.compose import compose
        from mode.records.record import read_records

        paths = compose(overrides or [], conf).paths
        results, runs = expand_home(paths.results), expand_home(paths.runs)
        records = read_records(results)
        for record in records:
            outcome = record.outcome
            print(
                f"{record.filename.removesuffix('.json'):<48} {outcome.steps:>6} steps  "
                f"{outcome.seconds:>8.0f} s  {record.origin.date}"
            )
        unfinished = list_unfinished(runs)
        for name in unfinished:
            print(f"{name:<48} interrupted; the command that started it continues from its checkpoint")
        if not records and not unfinished:  # an interrupted first run leaves no folder of results
            results, runs = (find_folder(name, overrides or [], conf) for name in ("results", "runs"))
            print(f"no run in {results} or {runs}")


@app.command("budget")
def budget(
    table: Annotated[str, typer.Argument(help="Table.", autocompletion=complete("table"))] = "table1",
    overrides: Overrides = None,
    conf: ConfOption = None,
) -> None:
    """Forecast the cost of every row of a table.

    The forecast has steps, tokens, operations, parameters, minutes and memory.

    Example: mode show budget table1 budget=compute
    """
    with reporting_errors():
        from mode.config.compose import compose
        from mode.core.device import measure_matrix_rate, set_up
        from mode.launch.table_runs import forecast_table

        if "=" in table:
            table, overrides = "table1", [table, *(overrides or [])]
        given = list(overrides or [])
        rows = forecast_table(table, given, conf)
        train = compose(given, conf).train
        rate = measure_matrix_rate(set_up(train.threads, train.device))
        heads = ("steps", "tokens M", "TFLOPs", "trained M", "added M", "active M", "minutes", "GB")
        width = max(map(len, rows)) + 1
        print(f"{'row':<{width}}" + "".join(f"{head:>11}" for head in heads))
        for label, stages in rows.items():
            print(f"{label:<{width}}" + "".join(f"{cell:>11}" for cell in format_forecast(stages, rate)))
        print(
            f"minutes: all operations at half of {rate / 1e9:,.0f} GFLOP/s, the rate of matrix products measured now; "
            "without scoring.\n"
            "GB: parameters, gradients and optimizer state of the largest stage; without activations."
        )


def format_forecast(stages: Sequence[Forecast] | None, rate: float) -> list[str]:
    """Render the forecast of the stages of a row; dashes if it is unknown."""
    if stages is None:
        return ["–"] * 8
    last, flops = stages[-1], sum(stage.flops for stage in stages)
    return [
        f"{sum(stage.steps for stage in stages):,}",
        f"{sum(stage.tokens for stage in stages) / 1e6:,.2f}",
        f"{flops / 1e12:,.2f}",
        f"{max(stage.trainable for stage in stages) / 1e6:,.3f}",
        f"{last.added / 1e6:,.3f}",
        f"{last.active / 1e6:,.3f}",
        f"{flops / (rate / 2) / 60:,.1f}",
        f"{max(stage.memory for stage in stages) / 1e9:,.2f}",
    ]


def list_unfinished(folder: Path) -> Sequence[str]:
    """Return the ids of unfinished runs that have a checkpoint."""
    return sorted({path.parent.name for path in find_paths(folder, "*/checkpoint-*")})


@app.command("config")
def config_command(overrides: Overrides = None, domain: DomainOption = None, conf: ConfOption = None) -> None:
    """Print the resolved configuration."""
    with reporting_errors():
        from mode.config.compose import compose

        show_config(compose(add_domains(overrides or [], domain), conf))
