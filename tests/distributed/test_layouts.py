"""Several processes that train one run: the same as alone, in one line when one of them dies, and on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.core import processes
from mode.distributed.choose import check_processes
from mode.records.record import read_records
from mode.runs.execute import execute
from mode.train.checkpoint import read_counters
from mode.train.curve import read_curve
from tests.conftest import World
from tests.support.processes import together
from tests.support.refusals import check_refused, refused
from tests.train.test_loop import run_of

pytestmark = pytest.mark.slow
EVERY = ("train.log_every=1", "train.checkpoint_every=4", "train.validate_every=0")
LOOP = ("train.steps=3", "train.batch.size=4", *EVERY)
LONG = ("train.steps=60", "train.batch.size=16", *EVERY)
# One of every kind: dense, in bf16, in micro-batches, composed, anchored, sparse, told of kinds, guessing, an ensemble.
METHODS: dict[str, tuple[str, ...]] = {
    "sft": ("method=sft",),
    "sft in bf16": ("method=sft", "train.precision=bf16"),
    "sft in micro-batches": ("method=sft", "train.batch.gradient_accumulation_steps=2"),
    "mode": ("method=mode",),
    "mode held to its backbone": ("method=mode-anchored", "method.anchor.source=prose", "method.anchor.share=0.25"),
    "mode held to its backbone in shards": (  # one of four rows, so that one process has none
        *("method=mode-anchored", "method.anchor.source=prose", "method.anchor.share=0.25", "method.anchor.weight=2"),
        "train.parallelism.strategy=fsdp",
    ),
    "lora held to its backbone in shards": (
        *("method=lora", "method.anchor.source=prose", "method.anchor.share=0.25", "train.parallelism.strategy=fsdp"),
    ),
    "btx": ("method=btx",),
    "loramoe": ("method=loramoe",),
    "moelora": ("method=moelora", "method.task=guessed"),
    "btm": ("method=btm",),
    "upcycling in shards": ("method=upcycling", "train.parallelism.strategy=fsdp"),
    "mode of some branches": ("method=mode", "method.start=fresh", "method.num_experts=4", "method.gate.top_k=2"),
    "mode in shards": ("method=mode", "method.num_blocks=2", "train.parallelism.strategy=fsdp"),
    "mole in shards, in bf16 and micro-batches": (  # and the LoRAs that it stands on
        *(
            "method=mole",
            "train.parallelism.strategy=fsdp",
            "train.precision=bf16",
            "train.batch.gradient_accumulation_steps=2",
        ),
    ),
}
SCRIPT = """
import json, sys
from pathlib import Path
from mode.config.compose import compose
from mode.runs.execute import execute
asked, conf = json.loads(sys.argv[1]), Path(sys.argv[2])
for overrides in asked:
    execute(compose(overrides, conf))
"""


@pytest.fixture(scope="module")
def records(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Any, Any]]:
    """The record of every method on two processes, and on one with twice the micro-batches."""
    alone, both = (shared_world.at(tmp_path_factory.mktemp(name)) for name in ("alone", "both"))
    asked = {name: [*both.overrides, *LOOP, *overrides] for name, overrides in METHODS.items()}
    together(2, SCRIPT, json.dumps(list(asked.values())), str(both.conf))
    found = {}
    for name, overrides in METHODS.items():
        parts = 4 if "train.batch.gradient_accumulation_steps=2" in overrides else 2
        plain = [text for text in overrides if not text.startswith("train.parallelism.strategy")]
        given = [*alone.overrides, *LOOP, *plain, f"train.batch.gradient_accumulation_steps={parts}"]
        found[name] = execute(compose(asked[name], both.conf)), execute(compose(given, alone.conf))
    return found


def test_two_processes_train_as_one_does(records: Mapping[str, tuple[Any, Any]]) -> None:
    """One test for all, so that of the workers of a test run one alone trains them."""
    for name, (both, alone) in records.items():
        check_pair(name, both, alone)


def check_pair(name: str, both: Any, alone: Any) -> None:
    """See that a record of two processes is that of one, but for rounding."""
    assert both.provenance["layout"] == {"kind": "fsdp" if "in shards" in name else "ddp", "processes": 2}
    assert "layout" not in alone.provenance
    close = 2e-2 if "bf16" in name else 1e-4
    losses = [[point["loss"] for point in record.happened["curve"]] for record in (both, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=close)
    for domain, score in alone.happened["scores"].items():
        found = both.happened["scores"][domain]
        assert found["tokens"] == score["tokens"]
        assert found["loss"] == pytest.approx(score["loss"], rel=close)
    for domain, gates in (alone.happened.get("gates") or {}).items():
        for place, mean in enumerate(gates["mean"]):
            assert both.happened["gates"][domain]["mean"][place] == pytest.approx(mean, abs=5e-3)


STOPPED = """
import json, sys
from pathlib import Path
from mode.config.compose import compose
from mode.runs.execute import execute
def stop(prepared, point):
    if point["step"] == int(sys.argv[3]):
        raise KeyboardInterrupt
try:
    execute(compose(json.loads(sys.argv[1]), Path(sys.argv[2])), observe=stop)
except (KeyboardInterrupt, RuntimeError):  # the second process's, when the first is gone
    sys.exit()
"""


def test_a_run_goes_on_with_other_processes_under_other_layouts(shared_world: World, tmp_path: Path) -> None:
    asked = ["method=mode", "method.start=fresh", "method.num_experts=1", "train.steps=8", "train.batch.size=4"]
    asked += [*EVERY, "train.checkpoint_every=2"]
    begun, plain = (shared_world.at(tmp_path / name) for name in ("begun", "plain"))
    for layout, count, stop in (("fsdp", 2, 2), ("mpmd", 4, 4), ("ddp", 2, 6)):
        given = [*begun.overrides, *asked, f"train.parallelism.strategy={layout}"]
        together(count, STOPPED, json.dumps(given), str(begun.conf), str(stop))
        (checkpoint,) = (begun.root / "runs").rglob("checkpoint-*")
        assert read_counters(checkpoint)[0] == stop
        assert len(list(checkpoint.glob("*.safetensors"))) == count  # each has written its part
    before = read_curve(checkpoint.with_name("curve.jsonl"))[:6]
    found = execute(compose([*begun.overrides, *asked], begun.conf))
    expected = execute(compose([*plain.overrides, *asked], plain.conf))
    assert found.id == expected.id
    assert found.happened["curve"][:6] == before  # seconds too: nothing was trained again
    losses = [[point["loss"] for point in record.happened["curve"]] for record in (found, expected)]
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_weight_that_is_a_number_alone_has_no_shards() -> None:
    from torch import nn

    from mode.distributed.fsdp import FSDP

    model = nn.Linear(2, 2)
    model.temperature = nn.Parameter(torch.ones(()))
    with refused("train.parallelism.strategy=fsdp", "ddp"):
        FSDP(model)


def test_rows_that_do_not_divide_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    settings = run_of(world, "method=sft", "train.batch.size=8", "train.batch.gradient_accumulation_steps=2").train
    with refused("train.batch.size=8", "3 processes", "train.batch.gradient_accumulation_steps=2"):
        check_processes(settings)
    check_processes(replace_settings(settings, **{"batch.size": 12}))
    check_processes(replace_settings(settings, **{"parallelism.strategy": "tp"}))
    monkeypatch.setenv("RANK", "2")
    assert processes.shard_rows(list(range(6))) == [4, 5]


def words(world: World, *overrides: str) -> list[str]:
    """Return the command that trains a run of the world."""
    return ["train", "baseline", "sft", *world.overrides, *overrides, "--conf", str(world.conf)]


def launched(count: int, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run `mode launch`."""
    asked = [sys.executable, "-m", "cli", "launch", "--nproc", str(count), *command]
    return subprocess.run(asked, capture_output=True, text=True, check=False, timeout=300)


def test_a_job_one_of_whose_processes_is_killed_says_so_and_goes_on(shared_world: World, tmp_path: Path) -> None:
    worlds = [shared_world.at(tmp_path / name) for name in ("whole", "first", "second")]
    asked = [[*world.overrides, "method=sft", *LONG] for world in worlds]
    for rank, world in enumerate(worlds[1:]):
        kill_one(world, rank)
    together(2, SCRIPT, json.dumps(asked), str(shared_world.conf))
    expected, *resumed = (read_records(world.root / "results")[0] for world in worlds)
    for record in resumed:
        losses = [[point["loss"] for point in each.happened["curve"]] for each in (expected, record)]
        assert losses[0] == losses[1]
        assert expected.happened["scores"] == record.happened["scores"]


def kill_one(world: World, rank: int) -> None:
    """Launch a run, kill one of its two processes while they train, and see what the job says."""
    asked = [sys.executable, "-m", "cli", "launch", "--nproc", "2", *words(world, *LONG)]
    with subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
        while job.poll() is None and not any(
            len(path.read_text("utf-8").splitlines()) > 10 for path in (world.root / "runs").rglob("curve.jsonl")
        ):
            time.sleep(0.01)
        one = next(pid for pid in children(job.pid) if f"\0RANK={rank}\0".encode() in environment(pid))
        os.kill(one, signal.SIGKILL)
        told = job.communicate(timeout=60)[1].splitlines()
    assert job.returncode == 1
    assert told[-1].startswith("mode: ")
    assert f"process {rank}" in told[-1]
    assert "SIGKILL" in told[-1]
    assert not any("Traceback" in line for line in told)
    assert list((world.root / "runs").rglob("checkpoint-*"))


def children(parent: int) -> list[int]:
    """Return the processes that one started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def environment(pid: int) -> bytes:
    """Return the environment that a process was started with."""
    return b"\0" + Path(f"/proc/{pid}/environ").read_bytes() + b"\0"


def test_other_commands_are_refused_to_several_processes() -> None:
    for rank in ("0", "1"):
        several = os.environ | {"WORLD_SIZE": "2", "RANK": rank}
        asked = [sys.executable, "-m", "cli", "reproduce", "table1"]
        done = subprocess.run(asked, env=several, capture_output=True, text=True, check=False)
        if rank == "0":
            check_refused(done, "reproduce", "train", "compose", "generate")
        else:
            assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("train baseline sft train.batch.size=3", "train.batch.size=3"),
        ("train baseline sfft", "sft?"),
        ("reproduce table1", "train, compose, generate"),
    ],
)
def test_mistakes_are_told_in_one_line(shared_world: World, tmp_path: Path, command: str, named: str) -> None:
    world = shared_world.at(tmp_path)
    given = command.split()
    settings = [word for word in given if "=" in word]
    done = launched(2, [*given[: len(given) - len(settings)], *world.overrides, *settings, "--conf", str(world.conf)])
    assert done.returncode == 2
    assert named in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("mode:") for line in done.stderr.splitlines()) == 1
