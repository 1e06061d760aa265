"""Execute the runs of a table and their earlier stages, several at a time, one process each; skip finished runs."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from mode.config.data import Domain
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.core.files import expand_home
from mode.core.interrupts import blocking_interrupts, end_with_parent
from mode.data.pack import Tokenizer, is_complete, locate_packed, prepare_domain
from mode.launch.worker import try_execute
from mode.methods.base import Method
from mode.runs.forecast import Forecast, forecast
from mode.runs.prepare import Prepared, find_finished, has_weights, prepare_run
from mode.tables.table import compose_row, compose_rows, list_rows_under, load_table


class Display(Protocol):
    """Display of the progress of several runs."""

    def start(self, run_id: str, name: str, steps: int) -> None:
        """Show that a run starts."""

    def point(self, run_id: str, point: dict[str, Any]) -> None:
        """Show a new point of a run's training curve."""

    def wait(self, run_id: str, holder: str) -> None:
        """Show that a run waits for another process, which trains the same run or a stage of it."""

    def end(self, run_id: str, error: str | None) -> None:
        """Show that a run has ended. `error` is None if it succeeded."""


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


@dataclass
class Outcome:
    """Outcome of a schedule.

    Attributes:
        skipped: Number of runs that were finished before.
        executed: Number of runs that were executed.
        failed: Error message of every failed run, by id.
    """

    skipped: int = 0
    executed: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def compose_table(name: str, seeds: Sequence[int] | None, overrides: Sequence[str], extra: Path | None) -> list[Run]:
    """Compose the runs of a table, all rows of one seed before the next seed.

    Args:
        name: Name of the table.
        seeds: Seeds; None for those of the table.
        overrides: Overrides of every run.
        extra: Folder of the user's own configuration.

    Raises:
        ConfigError: There is no such table, or its settings are not valid.
    """
    table = load_table(name, extra)
    rows = list_rows_under(table, overrides)
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


PRELOAD = ["mode.runs.execute", "mode.train.loop", "mode.evaluation.next_token", "mode.modular.model"]
"""Modules that every run needs and that are slow to import. The fork server imports them once for all runs."""


def prepare_data(runs: Sequence[Run], jobs: int, context: Any) -> None:
    """Prepare the domains that are missing from the cache, several at a time."""
    wanted: dict[str, tuple[Run, str]] = {}
    for run in (run for run in runs if isinstance(run.method, Method)):
        for name in run.scored:
            wanted.setdefault(f"{name} {run.domains[name]} {run.backbone} {run.paths.cache}", (run, name))
    missing = [(run, name) for run, name in wanted.values() if not is_complete(locate_packed(*list_parts(run, name)))]
    if min(jobs, len(missing)) < 2:
        return
    with blocking_interrupts():
        pool = context.Pool(min(jobs, len(missing)), initializer=end_with_parent)
    with pool:
        pool.starmap(prepare_one, missing, chunksize=1)


def prepare_one(run: Run, name: str) -> None:
    """Prepare one domain. An error is ignored here: `plan_runs` raises it again."""
    with suppress(ConfigError):
        prepare_domain(*list_parts(run, name))


def list_parts(run: Run, name: str) -> tuple[str, Domain, Tokenizer, Path]:
    """Return the arguments of `prepare_domain` for one domain of a run."""
    tokenizer = run.method.tokenizer(run)  # type: ignore[attr-defined]  # a table's rows have methods
    return name, run.domains[name], tokenizer, expand_home(run.paths.cache)


LONGEST_FOLDER = 72
"""Bytes of a folder's name: with the 31 that multiprocessing adds, it fits the 103 that every system takes."""
Start = Callable[[Run, str, Any], Any]
"""Starts a run, given its id and a queue of messages; returns a process or a `RemoteJob`."""


def run_all(
    runs: Sequence[Run], *, jobs: int, display: Display, start: Start | None = None, retries: int = 0
) -> Outcome:
    """Execute runs and their earlier stages. After a failure the other runs continue.

    Args:
        runs: The runs.
        jobs: Number of processes or jobs at a time.
        display: Display of the progress.
        start: Starts a run as a job of a launcher; None for processes of this machine.
        retries: How often a run is restarted whose process died without an error message.

    Raises:
        ConfigError: A run cannot be planned, or the folder of temporary files has too long a name.
    """
    check_temporary_folder()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    prepare_data(runs, jobs, context)
    nodes, skipped = plan_runs(runs)
    outcome = Outcome(skipped=skipped)
    messages: Any = context.Queue() if start is None else queue.Queue()
    active: dict[str, Any] = {}
    started: dict[str, Node] = {}
    tries: dict[str, int] = dict.fromkeys(nodes, 0)
    errors: dict[str, str] = {}
    try:
        while nodes or active:
            for run_id in list_ready(nodes)[: jobs - len(active)]:
                node = started[run_id] = nodes.pop(run_id)
                run = node.prepared.run
                display.start(run_id, name_run(run), node.prepared.method.steps(run))
                active[run_id] = (start or partial(start_process, context))(run, run_id, messages)
            wait_for_process(active.values())
            errors |= drain_messages(messages, display)
            for run_id in [run_id for run_id, process in active.items() if not process.is_alive()]:
                errors |= drain_messages(messages, display)
                process = active.pop(run_id)
                if run_id not in errors and process.exitcode != 0 and tries[run_id] < retries:
                    tries[run_id] += 1
                    nodes[run_id] = started[run_id]
                else:
                    record_outcome(run_id, process, errors.get(run_id), nodes, outcome, display)
    finally:
        for process in active.values():
            process.terminate()
    return outcome


def check_temporary_folder() -> None:
    """Refuse a folder of temporary files in which processes cannot have sockets: their paths have a limit."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise ConfigError(
            f"TMPDIR={folder} is longer than {LONGEST_FOLDER} bytes, too long for sockets between processes: "
            f"set it to a shorter folder, such as /tmp"
        )


def start_process(context: Any, run: Run, run_id: str, messages: Any) -> Any:
    """Start a run in a new process of this machine."""
    process = context.Process(target=execute_in_child, args=(run, run_id, messages), daemon=True)
    with blocking_interrupts():  # only this process handles Ctrl-C
        process.start()
    return process


def wait_for_process(processes: Collection[Any]) -> None:
    """Wait until a process ends, for at most half a second."""
    sentinels = [process.sentinel for process in processes if hasattr(process, "sentinel")]
    if sentinels:
        wait(sentinels, timeout=0.5)
    elif processes:
        time.sleep(0.5)


def list_ready(nodes: dict[str, Node]) -> list[str]:
    """Return the ids of runs that can start, those with the most dependents first."""
    free = [run_id for run_id, node in nodes.items() if not node.waits]
    return sorted(free, key=lambda run_id: -nodes[run_id].dependents)


def record_outcome(
    run_id: str, process: Any, error: str | None, nodes: dict[str, Node], outcome: Outcome, display: Display
) -> None:
    """Record how a run ended. Runs that depend on a failed run fail too."""
    process.join()
    if error is None and process.exitcode != 0:
        error = f"the process ended with exit code {process.exitcode}"
    display.end(run_id, error)
    if error is None:
        outcome.executed += 1
        for node in nodes.values():
            node.waits.discard(run_id)
        return
    outcome.failed[run_id] = error
    fail_waiting(run_id, nodes, outcome)


def fail_waiting(run_id: str, nodes: dict[str, Node], outcome: Outcome) -> None:
    """Mark the runs that depend on a failed run, directly or through others, as failed."""
    for waiting in [other for other, node in nodes.items() if run_id in node.waits]:
        if nodes.pop(waiting, None):  # None if an earlier call removed the run
            outcome.failed[waiting] = f"depends on run {run_id}, which failed"
            fail_waiting(waiting, nodes, outcome)


def drain_messages(messages: Any, display: Display) -> dict[str, str]:
    """Show the points and the waits in the queue, and return the error messages in the queue by run id."""
    errors: dict[str, str] = {}
    while True:
        try:
            run_id, kind, value = messages.get_nowait()
        except queue.Empty:
            return errors
        if kind == "error":
            errors[run_id] = value
        elif kind == "wait":
            display.wait(run_id, value)
        else:
            display.point(run_id, value)


def execute_in_child(run: Run, run_id: str, messages: Any) -> None:
    """Execute one run in a child process."""
    end_with_parent()
    error = try_execute(
        run,
        run_id,
        observe=lambda _, point: messages.put((run_id, "point", dict(point))),
        wait=lambda holder: messages.put((run_id, "wait", holder)),
    )
    if error is not None:
        messages.put((run_id, "error", error))


def name_run(run: Run) -> str:
    """Return a readable name of a run: its row, or the method and the domain of an expert; then the seed.

    The name of an expert has no row, since several rows may share the expert.
    """
    row = run.track.name or type(run.method).__name__.lower()
    name = row if len(run.targets) > 1 else f"{type(run.method).__name__} expert {run.targets[0]}"
    return f"{name} s{run.seed}"
