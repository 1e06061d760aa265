"""A table's runs are planned once, executed side by side, and a failure stops only what stands on it."""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mode.config.compose import compose
from mode.config.identity import describe_run
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.core.locks import LOCK, lock_folder
from mode.launch import schedule
from mode.launch.schedule import list_ready, name_run, prepare_data, run_all
from mode.launch.table_runs import Node, compose_table, plan_runs
from mode.records.record import read_records
from mode.runs.execute import WEIGHTS, execute
from mode.runs.prepare import prepare_run
from mode.tables.table import list_rows_under, load_table
from tests.cli.test_cli import call
from tests.conftest import World
from tests.support.processes import ends_soon
from tests.support.refusals import refused

ROWS = {
    "sft": ["method=sft"],
    "lora": ["method=lora"],
    "mode-2x": ["method=mode"],
    "mode-2x-frozen": ["method=mode", "method.train_experts=false"],
}


class Watch:
    """Notes what it is shown."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.started: dict[str, str] = {}
        self.points: list[tuple[str, int]] = []
        self.waited: list[tuple[str, str]] = []
        self.ended: dict[str, str | None] = {}
        self.left: list[str] = []

    def start(self, run_id: str, name: str, steps: int) -> None:
        self.started[run_id] = name

    def point(self, run_id: str, point: dict[str, Any]) -> None:
        self.points.append((run_id, point["step"]))

    def wait(self, run_id: str, holder: str) -> None:
        self.waited.append((run_id, holder))

    def end(self, run_id: str, error: str | None) -> None:
        self.ended[run_id] = error

    def leave(self, run_id: str) -> None:
        self.left.append(run_id)


def write_table(conf: Path, name: str, rows: dict[str, list[str]], **settings: Any) -> None:
    plain = {"title": f"{name}.", "rows": [{"name": row, "label": row, "overrides": rows[row]} for row in rows]}
    (conf / "table" / f"{name}.yaml").write_text(yaml.safe_dump(plain | settings, sort_keys=False), encoding="utf-8")


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    """Return the world with tables of the test's own."""
    conf = tmp_path / "conf"
    shutil.copytree(world.conf, conf)
    write_table(conf, "tiny", ROWS)
    return World(world.root, conf, world.overrides)


POLICIES = ("paper", "data", "compute", "params")


def runs_of(own: World, table: str = "tiny", seeds: tuple[int, ...] | None = None) -> list[Run]:
    return compose_table(table, seeds, own.overrides, own.conf)


# --- planning


@pytest.mark.slow
def test_a_row_with_a_budget_of_its_own_is_no_row_under_another() -> None:
    names = {
        policy: [row.name for row in list_rows_under(load_table("table1"), [f"budget={policy}"])] for policy in POLICIES
    }
    own = [row.name for row in load_table("table1").rows if any(text.startswith("budget=") for text in row.overrides)]
    assert own == ["mode-2x-data", "btm-data", "btm-top1-data", "btm-average-data", "btx-data"]
    others = [name for name in names["paper"] if name not in own]
    assert names["data"] == names["compute"] == names["params"] == others
    assert [run.track.name for run in compose_table("table1", [0], ["budget=compute"], None)] == names["compute"]


def test_a_tables_runs_come_seed_by_seed(own: World) -> None:
    write_table(own.conf, "two", {"sft": ["method=sft"], "best": ["method=lora", "method.rank=2"]}, seeds=[3])
    runs = runs_of(own, "two", (1, 2))
    assert [name_run(run) for run in runs] == ["sft s1", "best s1", "sft s2", "best s2"]
    assert [name_run(run) for run in runs_of(own, "two")] == ["sft s3", "best s3"]
    assert {run.track.group for run in runs} == {"two"}


@pytest.mark.slow
def test_a_plan_has_every_stage_once_and_knows_who_waits_for_it(own: World) -> None:
    runs = runs_of(own)
    nodes, done = plan_runs(runs)
    assert done == 0
    sft, lora, both, frozen = (prepare_run(run).id for run in runs)
    stages = [prepare_run(stage).id for stage in runs[2].method.needs(runs[2])]  # type: ignore[attr-defined]
    assert set(nodes) == {sft, lora, both, frozen, *stages}
    assert nodes[both].waits == nodes[frozen].waits == set(stages)
    assert {run_id: node.dependents for run_id, node in nodes.items()} == {
        sft: 0, lora: 0, both: 0, frozen: 0, stages[0]: 2, stages[1]: 2}  # fmt: skip
    assert list_ready(nodes)[:2] == stages
    assert set(list_ready(nodes)) == {sft, lora, *stages}
    assert name_run(nodes[stages[0]].prepared.run) == "MoDE expert py s0"
    assert plan_runs([*runs, *runs])[0].keys() == nodes.keys()


@pytest.mark.slow
def test_a_plan_leaves_out_what_is_done_and_trains_a_stage_anew_only_for_those_that_need_its_weights(
    own: World,
) -> None:
    sft, _, both, frozen = runs_of(own)
    execute(sft)
    execute(both)
    nodes, done = plan_runs(runs_of(own))
    assert done == 2 + 2  # the rows sft and mode-2x, and two stages
    assert {node.prepared.run.track.name for node in nodes.values()} == {"lora", "mode-2x-frozen"}
    stages = [prepare_run(stage) for stage in both.method.needs(both)]  # type: ignore[attr-defined]
    (stages[0].folder / WEIGHTS).unlink()
    assert plan_runs([both]) == ({}, 3)
    nodes, done = plan_runs([frozen])
    assert list(nodes) == [stages[0].id, prepare_run(frozen).id]
    assert nodes[prepare_run(frozen).id].waits == {stages[0].id}
    assert done == 1


# --- data


@pytest.mark.slow
def test_data_are_prepared_side_by_side_and_what_cannot_be_is_left_to_planning(own: World, tmp_path: Path) -> None:
    kept = [text for text in own.overrides if not text.startswith("paths.cache=")]
    given = [*kept, f"paths.cache={tmp_path / 'fresh'}", "domains.prose.sources=[{kind: files, paths: [/nowhere.txt]}]"]
    whole = [text for text in given if not text.startswith("domains.prose")]
    context = multiprocessing.get_context("forkserver")
    runs = compose_table("tiny", [0], whole, own.conf)
    prepare_data(runs, 2, context)
    packed = sorted(path.name.partition("-")[0] for path in (tmp_path / "fresh" / "packed").iterdir())
    assert packed == ["prose", "py", "sums"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "fresh" / "packed").glob("*/meta.json")}
    prepare_data(runs, 2, context)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with refused("nowhere"):
        run_all(compose_table("tiny", [0], given, own.conf), jobs=2, display=Watch())


def test_a_temporary_folder_too_long_for_sockets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * schedule.LONGEST_FOLDER)))
    with refused("TMPDIR"):
        run_all([], jobs=1, display=Watch())


# --- executing, with processes that only pretend


class Scripted:
    """Stands in for multiprocessing: each run follows its script."""

    def __init__(self, scripts: dict[str, Callable[[Any], int]]) -> None:
        """Take what each run does: it may send messages, and returns its exit code."""
        self.scripts, self.running, self.most = scripts, 0, 0
        self.order: list[str] = []

    def get_context(self, method: str) -> Scripted:
        assert method == "forkserver"
        return self

    def set_forkserver_preload(self, modules: list[str]) -> None:
        assert all(find_spec(module) for module in modules)  # one that is not there would be passed over

    def Queue(self) -> Any:  # noqa: N802
        return queue.Queue()

    def Process(self, target: Any, args: tuple[Any, str, Any], daemon: bool) -> Any:  # noqa: N802
        run_id, lives = args[1], iter([True, True, False])
        process = SimpleNamespace(sentinel=run_id, exitcode=None, join=lambda: None, terminate=lambda: None)

        def start() -> None:
            self.order.append(run_id)
            self.running += 1
            self.most = max(self.most, self.running)
            process.exitcode = self.scripts.get(run_id, lambda send: 0)(
                lambda *message: args[2].put((run_id, *message))
            )

        def is_alive() -> bool:
            alive = next(lives)
            self.running -= not alive
            return alive

        process.start, process.is_alive = start, is_alive
        return process


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    waits: dict[str, set[str]],
    scripts: dict[str, Callable[[Any], int]],
    jobs: int = 2,
    retries: int = 0,
) -> tuple[Any, Watch, Scripted]:
    """Run a plan with scripted processes."""
    run = SimpleNamespace(seed=0, targets=("a", "b"), method=None, track=SimpleNamespace(name="row"))
    prepared: Any = SimpleNamespace(run=run, method=SimpleNamespace(steps=lambda run: 4))
    nodes = {run_id: Node(prepared, set(needs)) for run_id, needs in waits.items()}
    for needs in waits.values():
        for run_id in needs:
            nodes[run_id].dependents += 1
    monkeypatch.setattr(schedule, "plan_runs", lambda runs: (nodes, 1))
    monkeypatch.setattr(schedule, "wait", lambda sentinels, timeout: None)
    scripted, watch = Scripted(scripts), Watch()
    monkeypatch.setattr(schedule, "multiprocessing", scripted)
    return run_all([], jobs=jobs, display=watch, retries=retries), watch, scripted


def test_no_more_processes_run_than_jobs_and_stages_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: dict[str, set[str]] = {"a": set(), "b": set(), "c": {"d", "e"}, "d": set(), "e": {"d"}, "f": set()}
    outcome, watch, scripted = pretend(monkeypatch, waits, {})
    assert (outcome.skipped, outcome.executed, outcome.failed) == (1, 6, {})
    assert scripted.most == 2
    order = scripted.order
    assert order[0] == "d"
    assert order.index("d") < order.index("e") < order.index("c")
    assert watch.ended == dict.fromkeys(waits)
    assert pretend(monkeypatch, waits, {}, jobs=1)[2].most == 1


def test_a_failure_reaches_all_that_stand_on_it_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(send: Any) -> int:
        send("error", "it broke")
        return 0

    waits: dict[str, set[str]] = {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"b", "c"}, "e": set(), "f": {"e"}}
    outcome, watch, scripted = pretend(monkeypatch, waits, {"a": fails})
    assert outcome.failed["a"] == "it broke"
    assert outcome.failed["b"] == "depends on run a, which failed"
    assert set(outcome.failed) == {"a", "b", "c", "d"}
    assert "depends on" in outcome.failed["c"]
    assert outcome.executed == 2
    assert set(scripted.order) == {"a", "e", "f"}
    assert watch.ended == {"a": "it broke", "e": None, "f": None}


def test_an_error_sent_long_before_the_process_ends_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    # Scripted processes stay alive for two more rounds after they have sent everything.
    outcome, watch, _ = pretend(monkeypatch, {"a": set()}, {"a": lambda send: send("error", "early") or 0})
    assert outcome.failed == {"a": "early"}
    assert watch.ended == {"a": "early"}


def test_a_process_that_dies_without_a_word_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, _, _ = pretend(monkeypatch, {"a": set()}, {"a": lambda send: -9})
    assert outcome.failed == {"a": "the process ended with exit code -9"}


def test_a_run_whose_process_dies_is_started_again_and_one_that_fails_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = iter([-9, 0])

    def wrong(send: Any) -> int:
        send("error", "it is wrong")
        return 1

    scripts: dict[str, Any] = {"a": lambda send: next(codes), "b": wrong, "d": lambda send: -9}
    waits: dict[str, set[str]] = {"a": set(), "b": set(), "c": {"a"}, "d": set()}
    outcome, _, scripted = pretend(monkeypatch, waits, scripts, retries=1)
    assert outcome.failed == {"b": "it is wrong", "d": "the process ended with exit code -9"}
    assert outcome.executed == 2
    assert sorted(scripted.order) == ["a", "a", "b", "c", "d", "d"]


def test_points_of_the_curve_reach_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    _, watch, _ = pretend(monkeypatch, {"a": set()}, {"a": lambda send: send("point", {"step": 2}) or 0})
    assert watch.points == [("a", 2)]


def test_a_child_tells_a_mistake_in_one_line_and_keeps_the_traceback_of_anything_else(
    own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(own.conf, "one", {"sft": ["method=sft"]})
    run = runs_of(own, "one")[0]
    sent: queue.Queue[Any] = queue.Queue()

    def broken(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("mode.launch.worker.execute", broken)
    schedule.execute_in_child(run, "run1", sent, None)
    run_id, kind, message = sent.get_nowait()
    log = Path(run.paths.runs) / "run1" / "error.log"
    assert (run_id, kind) == ("run1", "error")
    assert message == f"ZeroDivisionError: division by zero (see {log})"
    assert "Traceback" in log.read_text("utf-8")


@pytest.mark.slow
def test_runs_that_stand_on_the_same_finished_stage_do_not_meet_at_its_lock(own: World) -> None:
    write_table(own.conf, "one", {"sft": ["method=sft"]})
    run = runs_of(own, "one")[0]
    with lock_folder(prepare_run(run).folder), refused(str(prepare_run(run).folder)):
        execute(run)
    record = execute(run)
    with lock_folder(prepare_run(run).folder):
        assert execute(run, weights=True) == record


# --- executing, with processes of their own


@pytest.mark.slow
def test_a_table_is_reproduced_by_two_processes_and_then_needs_nothing(own: World) -> None:
    runs = runs_of(own)
    watch = Watch()
    outcome = run_all(runs, jobs=2, display=watch)
    assert outcome.failed == {}
    assert (outcome.skipped, outcome.executed) == (0, 6)
    assert set(watch.ended.values()) == {None}
    assert {(run_id, step) for run_id in watch.started for step in (2, 4)} == set(watch.points)
    records = {record.id: record for record in read_records(Path(runs[0].paths.results))}
    assert set(records) == set(watch.started)
    again = run_all(runs, jobs=2, display=Watch())
    assert (again.executed, again.failed) == (0, {})
    assert again.skipped == 6
    # What a process of its own computes is what this one computes.
    here = execute(runs[1], again=True)
    assert here.happened["scores"] == records[here.id].happened["scores"]


@pytest.mark.slow
def test_a_failing_row_does_not_stop_the_rest(own: World) -> None:
    rows = {
        "lora-wrong": ["method=lora", "method.target_modules=[q_porj]"],
        "mode-wrong": ["method=mode", "method.num_blocks=4"],  # both stages fail, so the row that stands on them does
        "sft": ["method=sft"],
    }
    write_table(own.conf, "broken", rows)
    runs = runs_of(own, "broken")
    lora, modular, sft = (prepare_run(run).id for run in runs)
    stages = [prepare_run(stage).id for stage in runs[1].method.needs(runs[1])]  # type: ignore[attr-defined]
    watch = Watch()
    outcome = run_all(runs, jobs=2, display=watch)
    assert outcome.executed == 1
    assert set(outcome.failed) == {lora, modular, *stages}
    assert "method.target_modules: q_porj is not one of the backbone's" in outcome.failed[lora]
    assert "method.num_blocks=4: 6 layers divide into" in outcome.failed[stages[0]]
    assert outcome.failed[modular] in {f"depends on run {stage}, which failed" for stage in stages}
    assert modular not in watch.started
    assert watch.ended[lora] == outcome.failed[lora]
    assert {record.id for record in read_records(Path(runs[0].paths.results))} == {sft}


@pytest.mark.slow
def test_an_interrupted_table_leaves_no_process_behind(own: World) -> None:
    import multiprocessing

    class Interrupting(Watch):
        def point(self, run_id: str, point: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(runs_of(own), jobs=2, display=Interrupting())
    for process in multiprocessing.active_children():
        process.join(10)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_table_that_is_terminated_takes_its_runs_with_it(own: World) -> None:
    write_table(own.conf, "one", {"sft": ["method=sft"]}, seeds=[0])
    long = [*own.overrides, "train.steps=100000", "--conf", str(own.conf)]
    command = [sys.executable, "-m", "cli", "reproduce", "one", *long]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list((own.root / "runs").rglob("curve.jsonl")):
            time.sleep(0.02)
        process.terminate()
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert told.splitlines()[-1] == "mode: stopped; the same command continues from the last checkpoint"
    (curve,) = (own.root / "runs").rglob("curve.jsonl")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(ConfigError), lock_folder(curve.parent):  # nobody trains there any more
            return
        time.sleep(0.1)
    pytest.fail("a run goes on without its table")


def wait_for_curve(folder: Path, process: subprocess.Popen[str]) -> Path:
    """Wait until a run trains; return its training curve."""
    while process.poll() is None and not (curves := list((folder / "runs").rglob("curve.jsonl"))):
        time.sleep(0.02)
    (curve,) = curves
    return curve


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_table_whose_process_is_killed_leaves_no_trainer_and_goes_on(own: World, number: signal.Signals) -> None:
    write_table(own.conf, "one", {"sft": ["method=sft"]}, seeds=[0])
    long = [*own.overrides, "train.steps=100000", "train.log_every=1"]
    command = [sys.executable, "-m", "cli", "reproduce", "one", *long, "--conf", str(own.conf)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        curve = wait_for_curve(own.root, process)
        trainer = int((curve.parent / LOCK).read_text("utf-8"))
        process.send_signal(number)
        text = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if number == signal.SIGHUP else -number)
    assert "Traceback" not in text
    assert ends_soon(trainer)
    with lock_folder(curve.parent):  # the same command can go on
        pass


@pytest.mark.slow
def test_a_table_waits_for_a_run_that_another_process_trains_and_says_so_once(own: World) -> None:
    write_table(own.conf, "one", {"sft": ["method=sft"]}, seeds=[0])
    (run,) = runs_of(own, "one")
    prepared, held = prepare_run(run), ExitStack()

    class Releasing(Watch):
        def wait(self, run_id: str, holder: str) -> None:
            super().wait(run_id, holder)
            held.close()

    held.enter_context(lock_folder(prepared.folder))
    watch = Releasing()
    outcome = run_all([run], jobs=1, display=watch)
    assert (outcome.executed, outcome.failed) == (1, {})
    assert watch.waited == [(prepared.id, f"process {os.getpid()}")]
    assert [record.id for record in read_records(own.root / "results")] == [prepared.id]
    with lock_folder(prepared.folder), refused(prepared.id, str(os.getpid())):
        execute(run, again=True)  # a single run does not wait


@pytest.mark.slow
def test_table_one_on_a_real_model_runs_dry(world: World) -> None:
    experiment = "experiment=table1_smollm2"
    assert compose([experiment]).backbone.name == "smollm2-135m"
    small = ["train.steps=3", "train.sequence_length=16", "train.log_every=1", "train.checkpoint_every=1"]
    runs = compose_table("table1", [0], [experiment, *world.overrides, *small], world.conf)
    assert [run.train.batch.size for run in runs] == [2] * len(runs)
    assert {run.train.optim.warmup_ratio for run in runs} == {0.03}
    assert len({str(describe_run(run)) for run in runs}) == len(load_table("table1").rows) == 26
    first_of_each = {type(run.method): run for run in reversed(runs)}
    assert len(first_of_each) == 9
    for run in first_of_each.values():
        record = execute(run, weights=True)
        assert (record.asked["train"]["batch_size"], record.asked["train"]["warmup"]) == (2, 0.03)


@pytest.mark.slow
def test_a_table_that_is_rendered_already_is_not_drawn_again(own: World) -> None:
    write_table(own.conf, "one", {"sft": ["method=sft"]}, seeds=[0])
    result = call(own, "reproduce", "one")
    assert result.exit_code == 0, result.output
    (figure,) = (own.root / "results").glob("one*.png")
    before = figure.stat().st_mtime_ns
    assert call(own, "reproduce", "one").exit_code == 0
    assert figure.stat().st_mtime_ns == before
    assert call(own, "report", "one").exit_code == 0
    drawn = figure.stat().st_mtime_ns
    assert drawn > before
    next((own.root / "results" / "records").glob("*.json")).touch()
    assert call(own, "reproduce", "one").exit_code == 0
    assert figure.stat().st_mtime_ns > drawn
