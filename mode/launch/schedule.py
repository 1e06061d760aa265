"""Execute all the runs that a table needs, one process per run, several at a time, skipping what exists."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from mode.config.data import Domain
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.data.pack import Tokenizer, is_complete, locate_packed, prepare_domain
from mode.launch.worker import try_execute
from mode.methods.base import Method
from mode.runs.forecast import Forecast, forecast
from mode.runs.prepare import Prepared, find_finished, has_weights, prepare_run
from mode.tables.table import compose_row, compose_rows, list_rows_under, load_table


class Display(Protocol):
    """Where the progress of several runs is shown."""

    def start(self, run_id: str, name: str, steps: int) -> None:
        """A run begins."""

    def point(self, run_id: str, point: dict[str, Any]) -> None:
        """A run has a new point of its training curve."""

    def end(self, run_id: str, error: str | None) -> None:
        """A run has ended, well or with an error."""


@dataclass
class Node:
    """A run to execute and the ids of those it waits for."""

    prepared: Prepared
    waits: set[str]
    dependents: int = 0


@dataclass
class Outcome:
    """What became of a plan: how many runs were done before, how many were executed, and which failed and why."""

    skipped: int = 0
    executed: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def table_runs(name: str, seeds: Sequence[int] | None, overrides: Sequence[str], extra: Path | None) -> list[Run]:
    """Compose the runs of a table, seed by seed, so that a whole table stands as early as possible."""
    table = load_table(name, extra)
    rows = list_rows_under(table, overrides)
    return [compose_row(table, row, seed, overrides, extra) for seed in (seeds or table.seeds) for row in rows]


def forecast_table(name: str, overrides: Sequence[str], extra: Path | None) -> dict[str, tuple[Forecast, ...] | None]:
    """Return what every stage of every row of a table is to take, by the row's label; None where a method cannot say.

    Raises:
        ConfigError: There is no such table, or its settings do not fit.
    """
    table = load_table(name, extra)
    labels = {row.name: row.label for row in table.rows}
    found: dict[str, tuple[Forecast, ...] | None] = {}
    for row, run in compose_rows(table, overrides, extra).items():
        stages = [forecast(stage) for stage in list_stages(run)]
        told = tuple(stage for stage in stages if stage is not None)
        found[labels[row]] = told if len(told) == len(stages) else None
    return found


def list_stages(run: Run) -> list[Run]:
    """Return a run after those that it stands on."""
    needs = run.method.needs(run) if isinstance(run.method, Method) else ()
    return [*(stage for need in needs for stage in list_stages(need)), run]


def plan_runs(runs: Sequence[Run]) -> tuple[dict[str, Node], int]:
    """Work out which runs remain, with the earlier stages they stand on.

    Returns:
        Nodes by id, in order, and the number of runs that are done already.
    """
    nodes: dict[str, Node] = {}
    done: set[str] = set()

    def visit(run: Run, *, weights: bool) -> str | None:
        prepared = prepare_run(run)
        if prepared.id in nodes:
            return prepared.id
        prepared.method.steps(run)  # what cannot be planned is told before anything runs
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
"""What every run imports, in seconds: it is imported once, by the process that those of the runs are forked from."""


def prepare_data(runs: Sequence[Run], jobs: int, context: Any) -> None:
    """Prepare the domains of runs side by side, those that are not in the cache yet."""
    wanted: dict[str, tuple[Run, str]] = {}
    for run in (run for run in runs if isinstance(run.method, Method)):
        for name in run.scored:
            wanted.setdefault(f"{name} {run.domains[name]} {run.backbone} {run.paths.cache}", (run, name))
    missing = [(run, name) for run, name in wanted.values() if not is_complete(locate_packed(*list_parts(run, name)))]
    if min(jobs, len(missing)) < 2:
        return
    with ignore_interrupts():
        pool = context.Pool(min(jobs, len(missing)))
    with pool:
        pool.starmap(prepare_one, missing, chunksize=1)


def prepare_one(run: Run, name: str) -> None:
    """Prepare one domain; if it cannot be, planning tells why."""
    with suppress(ConfigError):
        prepare_domain(*list_parts(run, name))


def list_parts(run: Run, name: str) -> tuple[str, Domain, Tokenizer, Path]:
    """Return what preparing one domain of a run takes."""
    tokenizer = run.method.tokenizer(run)  # type: ignore[attr-defined]  # a table's rows have methods
    return name, run.domains[name], tokenizer, Path(run.paths.cache).expanduser()


Start = Callable[[Run, str, Any], Any]
"""Starts a run, given its id and a queue for what it has to tell; returns a process, or what looks like one."""


def run_all(
    runs: Sequence[Run], *, jobs: int, display: Display, start: Start | None = None, retries: int = 0
) -> Outcome:
    """Execute runs and what they stand on, `jobs` processes at a time; a failure does not stop the rest.

    Args:
        runs: The runs.
        jobs: Processes, or other jobs, at a time.
        display: Where progress is shown.
        start: Starts a run elsewhere than in a process of this machine.
        retries: Times that a run is started again whose process has died without a word.
    """
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
                    note_end(run_id, process, errors.get(run_id), nodes, outcome, display)
    finally:
        for process in active.values():
            process.terminate()
    return outcome


def start_process(context: Any, run: Run, run_id: str, messages: Any) -> Any:
    """Start a run in a process of this machine."""
    process = context.Process(target=execute_in_child, args=(run, run_id, messages), daemon=True)
    with ignore_interrupts():  # inherited: Ctrl-C is the parent's to answer
        process.start()
    return process


def wait_for_process(processes: Collection[Any]) -> None:
    """Wait until a process ends, or for half a second."""
    sentinels = [process.sentinel for process in processes if hasattr(process, "sentinel")]
    if sentinels:
        wait(sentinels, timeout=0.5)
    elif processes:
        time.sleep(0.5)


@contextmanager
def ignore_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C for a moment."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def list_ready(nodes: dict[str, Node]) -> list[str]:
    """Return the runs that wait for nothing, those that others wait for first."""
    free = [run_id for run_id, node in nodes.items() if not node.waits]
    return sorted(free, key=lambda run_id: -nodes[run_id].dependents)


def note_end(
    run_id: str, process: Any, error: str | None, nodes: dict[str, Node], outcome: Outcome, display: Display
) -> None:
    """Note how a run ended; runs that stand on one that failed fail with it."""
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
    """Fail every run that stands on one that failed, directly or through others."""
    for waiting in [other for other, node in nodes.items() if run_id in node.waits]:
        if nodes.pop(waiting, None):  # else it stood on another that failed too
            outcome.failed[waiting] = f"stands on {run_id}, which failed"
            fail_waiting(waiting, nodes, outcome)


def drain_messages(messages: Any, display: Display) -> dict[str, str]:
    """Pass on what the processes have sent, and return their errors by run."""
    errors: dict[str, str] = {}
    while True:
        try:
            run_id, kind, value = messages.get_nowait()
        except queue.Empty:
            return errors
        if kind == "error":
            errors[run_id] = value
        else:
            display.point(run_id, value)


def execute_in_child(run: Run, run_id: str, messages: Any) -> None:
    """Execute one run in a process of its own."""
    mistake = try_execute(run, run_id, lambda _, point: messages.put((run_id, "point", dict(point))))
    if mistake is not None:
        messages.put((run_id, "error", mistake))


def name_run(run: Run) -> str:
    """Name a run for people: its row and, for a stage of one domain, that domain; then the seed.

    Stage-1 runs belong to every row that composes their experts.
    """
    row = run.track.name or type(run.method).__name__.lower()
    name = row if len(run.targets) > 1 else f"{type(run.method).__name__} expert {run.targets[0]}"
    return f"{name} s{run.seed}"
