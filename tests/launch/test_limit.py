"""A time limit on the runs of a table: they end at a checkpoint, and go on another time."""

from __future__ import annotations

import queue
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli.progress import LEFT
from mode.launch import limit as limits
from mode.launch.limit import OutOfTimeError, TimeLimit, make_stopper
from mode.launch.schedule import execute_in_child, run_all
from mode.records.record import read_records
from mode.runs.execute import execute
from mode.runs.prepare import find_finished, prepare_run
from mode.train.checkpoint import list_checkpoints, read_counters
from mode.train.curve import read_curve
from tests.cli.test_cli import call
from tests.conftest import World
from tests.launch.test_schedule import Watch, own, runs_of, write_table  # noqa: F401  # a fixture


def test_a_run_stops_at_the_last_checkpoint_before_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: clock.now))
    limit = TimeLimit.after(50.0)
    stop = make_stopper(limit, checkpoint_every=4, steps=20)
    for step, clock.now in ((4, 115.0), (6, 149.0), (8, 130.0)):  # no end where there is no checkpoint
        stop(step)
    clock.now = 145.0  # the next one would be at 160
    with pytest.raises(OutOfTimeError):
        stop(12)
    assert not limit.is_over
    clock.now = 150.0
    assert limit.is_over
    stop(20)  # nothing but the scores is left


@pytest.mark.slow
def test_a_run_that_the_limit_ends_goes_on_to_the_same_bits(own: World, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("mode.launch.schedule.end_with_parent", lambda: None)
    write_table(own.conf, "one", {"sft": ["method=sft", "train.steps=6", "train.log_every=1"]}, seeds=[0])
    (run,) = runs_of(own, "one")
    prepared, sent = prepare_run(run), queue.Queue()  # type: ignore[var-annotated]
    execute_in_child(run, prepared.id, sent, TimeLimit(time.monotonic()))
    kinds = [sent.get_nowait()[1] for _ in range(sent.qsize())]
    assert kinds == ["point", "point", "stopped"]
    (checkpoint,) = list_checkpoints(prepared.folder)
    assert read_counters(checkpoint)[0] == run.train.checkpoint_every == 2
    assert find_finished(prepared) is None
    execute_in_child(run, prepared.id, sent, None)
    whole = own.at(own.root / "whole")
    (other,) = runs_of(whole, "one")
    curves = [[(p["step"], p["loss"]) for p in read_curve(prepare_run(r).folder / "curve.jsonl")] for r in (run, other)]
    expected = execute(other)
    curves[1] = [(p["step"], p["loss"]) for p in read_curve(prepare_run(other).folder / "curve.jsonl")]
    assert curves[0] == curves[1]
    found = find_finished(prepared)
    assert found is not None
    assert found.happened["scores"] == expected.happened["scores"]


class Endless:
    """A process that runs until it is terminated."""

    exitcode: int | None = None

    def is_alive(self) -> bool:
        return self.exitcode is None

    def terminate(self) -> None:
        self.exitcode = -15

    def join(self) -> None:
        pass


def test_what_runs_at_the_limit_is_ended_and_what_waits_does_not_start(own: World) -> None:  # noqa: F811
    write_table(own.conf, "two", {"sft": ["method=sft"], "lora": ["method=lora"]}, seeds=[0])
    started: list[str] = []

    def start(run: Any, run_id: str, messages: Any) -> Endless:
        started.append(run_id)
        return Endless()

    watch = Watch()
    end = TimeLimit.after(1.0)
    outcome = run_all(runs_of(own, "two"), jobs=1, display=watch, start=start, retries=3, limit=end)
    assert end.is_over
    assert (outcome.left, outcome.executed, outcome.failed) == (2, 0, {})
    assert watch.left == started
    assert len(started) == 1
    assert run_all(runs_of(own, "two"), jobs=1, display=Watch(), start=start, limit=end).left == 2
    assert len(started) == 1


class Stopping(Endless):
    """A process that ends at a checkpoint, because its time is up."""

    def __init__(self, run_id: str, messages: Any) -> None:
        """Tell that the time is up, and end."""
        messages.put((run_id, "stopped", ""))
        self.exitcode = 0


def test_after_a_run_had_too_little_time_no_other_starts(own: World) -> None:  # noqa: F811
    write_table(own.conf, "two", {"sft": ["method=sft"], "lora": ["method=lora"]}, seeds=[0])
    watch = Watch()
    outcome = run_all(
        runs_of(own, "two"),
        jobs=1,
        display=watch,
        start=lambda run, run_id, messages: Stopping(run_id, messages),
        limit=TimeLimit.after(60.0),
    )
    assert (outcome.left, outcome.executed, outcome.failed, len(watch.left)) == (2, 0, {}, 1)


@pytest.mark.slow
def test_the_command_says_what_is_left_and_goes_on(own: World, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    write_table(own.conf, "two", {"bare": ["method=backbone"], "sft": ["method=sft"]}, seeds=[0])
    monkeypatch.setattr(TimeLimit, "after", classmethod(lambda cls, seconds: cls(0.0)))
    result = call(own, "reproduce", "two", "--within", "9m")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "2 runs are left" in result.stderr
    assert not list(Path(own.root / "results").glob("two*"))
    monkeypatch.undo()
    result = call(own, "reproduce", "two", "--within", "1h30m")
    assert result.exit_code == 0, result.output
    assert "2 runs executed" in result.stderr
    assert LEFT not in result.stderr
    assert len(read_records(own.root / "results")) == 2


@pytest.mark.parametrize("text", ["9", "9x", "", "0s", "-1m", "m", "1m2h", "1.5h"])
def test_what_is_no_time_is_refused(own: World, text: str) -> None:  # noqa: F811
    result = call(own, "reproduce", "table1", f"--within={text}")
    assert result.exit_code == 2
    assert f"--within {text}" in result.stderr
    assert "9m" in result.stderr
