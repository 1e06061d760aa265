"""The runs of a table: composed, forecast, and in the order in which they and their earlier stages are executed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mode.config.run import Run
from mode.core.errors import ConfigError, suggest
from mode.methods.base import Method
from mode.runs.forecast import Forecast, forecast
from mode.runs.prepare import Prepared, find_finished, has_weights, prepare_run
from mode.tables.table import compose_row, compose_rows, list_rows_under, load_table


@dataclass
class Node:
    """A run to execute.

    Attributes:
        prepared: The run.
        waits: Ids of the runs that must finish first.
        dependents: Number of runs that wait for this run.
    """

    prepared: Prepared
    waits: set[str]
    dependents: int = 0


def compose_table(
    name: str,
    seeds: Sequence[int] | None,
    overrides: Sequence[str],
    extra: Path | None,
    names: Sequence[str] = (),
) -> list[Run]:
    """Compose the runs of a table, all rows of one seed before the next seed.

    Args:
        name: Name of the table.
        seeds: Seeds; None for those of the table.
        overrides: Overrides of every run.
        extra: Folder of the user's own configuration.
        names: Names of rows, in the order to execute them in; none for all rows in the table's order.

    Raises:
        ConfigError: There is no such table or row, or its settings are not valid.
    """
    table = load_table(name, extra)
    rows = list_rows_under(table, overrides, extra)
    if names:
        by_name = {row.name: row for row in rows}
        for unknown in (each for each in names if each not in by_name):
            raise ConfigError(
                f"table/{name}: row {unknown}: not one of {', '.join(by_name)}{suggest(unknown, by_name)}"
            )
        rows = tuple(by_name[each] for each in dict.fromkeys(names))
    return [compose_row(table, row, seed, overrides, extra) for seed in (seeds or table.seeds) for row in rows]


def forecast_table(name: str, overrides: Sequence[str], extra: Path | None) -> dict[str, tuple[Forecast, ...] | None]:
    """Return the forecast of every stage of every row of a table, by label of the row.

    The value is None if a method of the row has no closed form of its cost.

    Raises:
        ConfigError: There is no such table, or its settings are not valid.
    """
    table = load_table(name, extra)
    labels = {row.name: row.label for row in table.rows}
    forecasts: dict[str, tuple[Forecast, ...] | None] = {}
    for row, run in compose_rows(table, overrides, extra).items():
        stages = [forecast(stage) for stage in list_stages(run)]
        known = tuple(stage for stage in stages if stage is not None)
        forecasts[labels[row]] = known if len(known) == len(stages) else None
    return forecasts


def list_stages(run: Run) -> list[Run]:
    """Return the stages that a run depends on, in order, and the run itself as the last."""
    needs = run.method.needs(run) if isinstance(run.method, Method) else ()
    return [*(stage for need in needs for stage in list_stages(need)), run]


def plan_runs(runs: Sequence[Run]) -> tuple[dict[str, Node], int]:
    """Find the runs to execute, including earlier stages.

    Returns:
        Nodes by id, stages before the runs that need them, and the number of runs that are finished.

    Raises:
        ConfigError: A run cannot be prepared, or its number of steps cannot be computed.
    """
    nodes: dict[str, Node] = {}
    done: set[str] = set()

    def visit(run: Run, *, weights: bool) -> str | None:
        prepared = prepare_run(run)
        if prepared.id in nodes:
            return prepared.id
        prepared.method.steps(run)  # raises now, before anything runs, if the budget does not fit the method
        complete = find_finished(prepared) is not None and (has_weights(prepared) or not weights)
        waits = [visit(stage, weights=not complete) for stage in prepared.method.needs(run)]
        if complete:
            done.add(prepared.id)
            return None
        nodes[prepared.id] = Node(prepared, {run_id for run_id in waits if run_id})
        return prepared.id

    for run in runs:
        visit(run, weights=False)
    for node in nodes.values():
        for run_id in node.waits:
            nodes[run_id].dependents += 1
    return nodes, len(done)
