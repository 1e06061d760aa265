"""Runs of a table as jobs of submitit's local executor and of a Ray of one machine, for real."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mode.config.groups import list_members, read_group
from mode.launch.launchers import Launcher, make_starter, read_launcher
from mode.launch.schedule import run_all
from mode.launch.table_runs import compose_table
from mode.records.record import read_records
from mode.runs.execute import execute
from tests.cli.test_cli import call
from tests.conftest import World
from tests.launch.test_schedule import Watch, write_table
from tests.support.refusals import check_refused, refused
from tests.train.test_loop import curve_of

KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(find_spec(kind) is None, reason=f"needs the extra `{kind}`"))
    for kind in ("submitit", "ray")
]
PARAMETERS: dict[str, dict[str, Any]] = {"submitit": {"timeout_min": 5}, "ray": {"num_cpus": 1}}


def launcher_of(kind: str, **settings: Any) -> Launcher:
    """Return a launcher on this machine."""
    return Launcher(kind=kind, cluster="local", parameters=PARAMETERS[kind], **settings)  # type: ignore[arg-type]


class Killing(Watch):
    """Kills the process that trains a run when it has a checkpoint, once."""

    def __init__(self) -> None:
        """Begin with nothing killed."""
        super().__init__()
        self.killed = 0

    def point(self, run_id: str, point: dict[str, Any]) -> None:
        super().point(run_id, point)
        assert point["tokens_per_second"] > 0  # as of a local process
        if not self.killed and point["step"] >= 4:
            self.killed = holder(run_id)
            os.kill(self.killed, signal.SIGKILL)


def holder(run_id: str) -> int:
    """Return the process that holds a run's lock."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                files = [os.readlink(link) for link in (folder / "fd").iterdir()]
            except OSError:
                continue
            if any(name.endswith(f"{run_id}/lock") for name in files):
                return int(folder.name)
    raise AssertionError(f"no process trains {run_id}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_job_that_dies_goes_on_from_its_checkpoint_and_one_that_fails_does_not_stop_the_rest(
    world: World, kind: str, tmp_path: Path
) -> None:
    rows = {"wrong": ["method=lora", "method.target_modules=[q_porj]"], "sft": ["method=sft"]}
    write_table(world.conf, f"jobs-{kind}", rows, seeds=[0])
    long = [*world.overrides, "train.steps=48"]
    wrong, sft = compose_table(f"jobs-{kind}", [0], long, world.conf)
    watch = Killing()
    nproc = 2 if kind == "submitit" else 1  # of submitit, a job is itself several processes
    start = make_starter(launcher_of(kind, nproc=nproc), tmp_path / "jobs")
    outcome = run_all([wrong, sft], jobs=2, display=watch, start=start, retries=1)
    assert watch.killed
    (told,) = outcome.failed.values()
    assert "q_porj is not one of the backbone's" in told
    assert outcome.executed == 1
    (record,) = read_records(world.root / "results")
    there = world.at(world.root / "there")
    again = [text for text in long if not text.startswith("paths.re") and not text.startswith("paths.ru")]
    kept = [text for text in there.overrides if text.startswith(("paths.re", "paths.ru"))]
    plain = execute(compose_table(f"jobs-{kind}", [0], [*again, *kept], world.conf)[1])
    assert plain.id == record.id
    losses, expected = ([point["loss"] for point in curve_of(one)] for one in (record, plain))
    assert losses == (expected if nproc == 1 else pytest.approx(expected, rel=1e-4))
    assert record.provenance.get("layout", {"processes": 1})["processes"] == nproc


def test_every_launcher_that_ships_can_be_read() -> None:
    for name in list_members("launcher"):
        kind = read_group("launcher", name)["kind"]
        if kind == "local" or find_spec(kind):
            assert read_launcher(name).kind == kind


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("kind: slurm", ("launcher/mine.yaml", "kind", "'local', 'submitit' or 'ray'")),
        ("kind: local\nnproc: 2", ("launcher/mine.yaml", "nproc", "submitit", "ray")),
        ("kind: local\nretry: 2", ("launcher/mine.yaml", "retry")),
    ],
)
def test_a_launcher_that_is_wrong_says_where(tmp_path: Path, text: str, named: tuple[str, ...]) -> None:
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "mine.yaml").write_text(text)
    with refused(*named):
        read_launcher("mine", tmp_path)


@pytest.mark.slow
def test_a_launcher_that_is_not_there_is_told_with_the_nearest(world: World) -> None:
    result = call(world, "reproduce", "table1", "--launcher", "slrum")
    check_refused(result, "--launcher slrum", suggestion="slurm")


def test_a_library_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mode.launch.launchers.find_spec", lambda name: None)
    with refused("--launcher ray", "`pip install ray`"):
        read_launcher("ray")
