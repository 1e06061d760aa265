"""Columns of a table from elsewhere than its records: costs by closed form, and how many settings were tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from mode.backbone.shape import read_shape
from mode.config.run import Run
from mode.cost.flops import compute_untouched_cost
from mode.methods.base import count_generation
from mode.records.record import Record
from mode.tables.compile import RowResult, TableData, compile_table
from mode.tables.table import Table, last_value, load_table


def compile_in_full(table: Table, records: Sequence[Record], overrides: Sequence[str], extra: Path | None) -> TableData:
    """Return a table compiled from records (`compile_table`), with estimates of the costs that records do not hold.

    Raises:
        ConfigError: A row does not compose, or the record of an earlier stage is missing.
    """
    compiled = compile_table(table, records, overrides, extra)
    lines = [estimate_costs(line, compiled.settings[line.name]) for line in compiled.lines]
    experiment = last_value(overrides, "experiment")

    @cache
    def compile_choice(name: str) -> TableData | None:
        choice = load_table(name, extra)
        own = last_value(choice.overrides, "experiment")
        under = [f"experiment={experiment}"] if experiment and not own else []
        fits = own == experiment if own else under in choice.variants
        return compile_table(choice, records, under, extra) if fits else None

    for index, row in enumerate(compiled.table.rows):
        if row.chosen_in and lines[index].quality:
            tried = float(count_tried(row.chosen_in, compile_choice))
            lines[index] = replace(lines[index], cost={**lines[index].cost, "tried": tried})
    return replace(compiled, lines=tuple(lines))


def count_tried(places: Sequence[str], compile_choice: Callable[[str], TableData | None]) -> int:
    """Return the number of settings with a record that a row's settings were chosen from, each counted once.

    Args:
        places: Tables and methods of their rows, `TABLE/METHOD`.
        compile_choice: Compiles a table by name; None if the table is not for this budget.
    """
    runs: set[str] = set()
    for place in places:
        table, _, method = place.partition("/")
        compiled = compile_choice(table)
        lines = compiled.lines if compiled is not None else ()
        runs |= {run for line in lines if line.name.partition("@")[0] == method for run in line.runs.values()}
    return len(runs)


def estimate_costs(line: RowResult, run: Run) -> RowResult:
    """Return a row with the operations of sampling and, if its records lack them, of training, and active parameters.

    Records from before operations were counted lack them. The closed forms are held against torch's counter by tests.
    """
    if not line.quality:
        return line
    found = {}
    if sampling := count_sampling(run):
        found["sampling"] = sampling / 1e12
    generation = count_generation(run)
    if generation is not None:
        found["generation"] = generation / 1e6
    if "flops" not in line.cost or "active" not in line.cost:
        found |= estimate_training(run)
    estimated = frozenset(found.keys() - line.cost.keys() - {"sampling", "generation"})
    return replace(line, cost={**found, **line.cost}, estimated=estimated)


def count_sampling(run: Run) -> float:
    """Return the operations of sampling the rows of an anchor on the backbone's own text; 0.0 without such an anchor.

    A token is counted as one of a forward pass over a whole row. With a cache that is what it takes, but for the
    shorter contexts at the beginning. Runs of the same backbone share the rows.
    """
    anchor = getattr(run.method, "anchor", None)
    if anchor is None or anchor.source != "self":
        return 0.0
    length = run.train.sequence_length
    tokens: int = anchor.rows * length
    return tokens * compute_untouched_cost(read_shape(run.backbone), length).flops.forward


def estimate_training(run: Run) -> dict[str, float]:
    """Return the operations of all stages of a run and its active parameters; empty without closed forms."""
    from mode.launch.table_runs import list_stages
    from mode.runs.forecast import forecast

    stages: list[Run] = []
    for stage in list_stages(run):
        stages += [stage] if stage not in stages else []
    known = [expected for stage in stages if (expected := forecast(stage)) is not None]
    if len(known) < len(stages):
        return {}
    return {"flops": sum(expected.flops for expected in known) / 1e12, "active": known[-1].active / 1e6}
