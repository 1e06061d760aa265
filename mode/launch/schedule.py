"""Execute the runs of a table and their earlier stages, several at a time, one process each; skip finished runs."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
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
from mode.launch.limit import OutOfTimeError, TimeLimit, make_stopper
from mode.launch.table_runs import Node, plan_runs
from mode.launch.worker import try_execute
from mode.methods.base import Method


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

    def leave(self, run_id: str) -> None:
        """Show that a run is left unfinished, because the time is up."""


@dataclass
class Outcome:
    """Outcome of a schedule.

    Attributes:
        skipped: Number of runs that were finished before.
        executed: Number of runs that were executed.
        failed: Error message of every failed run, by id.
        left: Number of runs that a time limit left unfinished.
    """

    skipped: int = 0
    executed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    left: int = 0


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
    runs: Sequence[Run],
    *,
    jobs: int,
    display: Display,
    start: Start | None = None,
    retries: int = 0,
    limit: TimeLimit | None = None,
    announce: Callable[[Sequence[Run]], None] = lambda runs: None,
) -> Outcome:
    """Execute runs and their earlier stages. After a failure the other runs continue.

    Args:
        runs: The runs.
        jobs: Number of processes or jobs at a time.
        display: Display of the progress.
        start: Starts a run as a job of a launcher; None for processes of this machine.
        retries: How often a run is restarted whose process died without an error message.
        limit: Moment at which all runs have ended, finished or not; None for no limit. Runs of this machine end at a
            checkpoint before it.
        announce: Called with the runs to execute, before the first of them starts.

    Raises:
        ConfigError: A run cannot be planned, or the folder of temporary files has too long a name.
    """
    check_temporary_folder()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    prepare_data(runs, jobs, context)
    nodes, skipped = plan_runs(runs)
    announce([node.prepared.run for node in nodes.values()])
    outcome = Outcome(skipped=skipped)
    messages: Any = context.Queue() if start is None else queue.Queue()
    schedule = Schedule(nodes, outcome, messages, display, retries, limit)
    starter = start or partial(start_process, context, limit)
    try:
        while schedule.active or (schedule.list_startable() and not schedule.is_over):
            for run_id in schedule.list_startable()[: jobs - len(schedule.active)]:
                schedule.start(run_id, starter)
            if schedule.is_over:
                schedule.terminate()
            wait_for_process(schedule.active.values())
            schedule.collect()
    finally:
        schedule.terminate()
    outcome.left += len(nodes)
    return outcome


@dataclass
class Schedule:
    """The runs that are still to start, and those that are active.

    Attributes:
        nodes: The runs to start, by id.
        outcome: What has happened so far.
        messages: Queue of messages of active runs.
        display: Display of the progress.
        retries: How often a run is restarted whose process died without an error message.
        limit: Moment at which all runs have ended; None for no limit.
        active: Processes or jobs of the active runs.
        started: Runs that were started.
        tries: Number of restarts of a run.
        errors: Error messages of runs.
        stopped: Runs that have ended at a checkpoint, because their time was up.
    """

    nodes: dict[str, Node]
    outcome: Outcome
    messages: Any
    display: Display
    retries: int
    limit: TimeLimit | None
    active: dict[str, Any] = field(default_factory=dict)
    started: dict[str, Node] = field(default_factory=dict)
    tries: Counter[str] = field(default_factory=Counter)
    errors: dict[str, str] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return self.limit is not None and self.limit.is_over

    def list_startable(self) -> list[str]:
        """Return the ids of runs that can start, those with the most dependents first.

        None can start after the time is up, or after a run has ended because it had too little time left.
        """
        return [] if self.is_over or self.stopped else list_ready(self.nodes)

    def start(self, run_id: str, starter: Start) -> None:
        """Start a run."""
        node = self.started[run_id] = self.nodes.pop(run_id)
        run = node.prepared.run
        self.display.start(run_id, name_run(run), node.prepared.method.steps(run))
        self.active[run_id] = starter(run, run_id, self.messages)

    def terminate(self) -> None:
        """End all active runs."""
        for process in self.active.values():
            process.terminate()

    def collect(self) -> None:
        """Show the messages of active runs, and record or restart those that have ended."""
        self.read_messages()
        for run_id in [run_id for run_id, process in self.active.items() if not process.is_alive()]:
            self.read_messages()
            process = self.active.pop(run_id)
            died = run_id not in self.errors and process.exitcode != 0
            if run_id in self.stopped or (died and self.is_over):
                self.outcome.left += 1
                self.display.leave(run_id)
            elif died and self.tries[run_id] < self.retries:
                self.tries[run_id] += 1
                self.nodes[run_id] = self.started[run_id]
            else:
                record_outcome(run_id, process, self.errors.get(run_id), self.nodes, self.outcome, self.display)

    def read_messages(self) -> None:
        """Show the points and the waits in the queue, and keep the errors."""
        while True:
            try:
                run_id, kind, value = self.messages.get_nowait()
            except queue.Empty:
                return
            if kind == "error":
                self.errors[run_id] = value
            elif kind == "stopped":
                self.stopped.add(run_id)
            elif kind == "wait":
                self.display.wait(run_id, value)
            else:
                self.display.point(run_id, value)


def check_temporary_folder() -> None:
    """Refuse a folder of temporary files in which processes cannot have sockets: their paths have a limit."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise ConfigError(
            f"TMPDIR={folder} is longer than {LONGEST_FOLDER} bytes, too long for sockets between processes: "
            f"set it to a shorter folder, such as /tmp"
        )


def start_process(context: Any, limit: TimeLimit | None, run: Run, run_id: str, messages: Any) -> Any:
    """Start a run in a new process of this machine."""
    process = context.Process(target=execute_in_child, args=(run, run_id, messages, limit), daemon=True)
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


def execute_in_child(run: Run, run_id: str, messages: Any, limit: TimeLimit | None) -> None:
    """Execute one run in a child process, and end it at its last checkpoint before the limit."""
    end_with_parent()
    steps = run.method.steps(run)  # type: ignore[attr-defined]  # a table's rows have methods
    stop = None if limit is None else make_stopper(limit, run.train.checkpoint_every, steps)

    def observe(_: Any, point: Mapping[str, Any]) -> None:
        messages.put((run_id, "point", dict(point)))
        if stop is not None:
            stop(point["step"])

    try:
        error = try_execute(run, run_id, observe=observe, wait=lambda holder: messages.put((run_id, "wait", holder)))
    except OutOfTimeError:
        messages.put((run_id, "stopped", ""))
        return
    if error is not None:
        messages.put((run_id, "error", error))


def name_run(run: Run) -> str:
    """Return a readable name of a run: its row, or the method and the domain of an expert; then the seed.

    The name of an expert has no row, since several rows may share the expert.
    """
    row = run.track.name or type(run.method).__name__.lower()
    name = row if len(run.targets) > 1 else f"{type(run.method).__name__} expert {run.targets[0]}"
    return f"{name} s{run.seed}"
