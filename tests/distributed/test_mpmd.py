"""Branches side by side: gradients and runs are those of one process, and a step has the collectives it should have."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from typer.testing import CliRunner

from cli.app import app
from mode.backbone.load import load_model
from mode.config.compose import compose
from mode.core.tensors import load_tensors
from mode.distributed.choose import choose_layout
from mode.distributed.mpmd import MPMD
from mode.methods.base import Material
from mode.modular.block import find_blocks
from mode.modular.execution import Execution
from mode.runs.execute import WEIGHTS, execute
from mode.runs.prepare import prepare_run
from mode.train.loop import TrainJob, forward_backward
from mode.train.objective import Objective
from mode.train.optimizer import make_optimizer
from mode.train.step_batch import StepBatch
from tests.conftest import World
from tests.distributed.test_layouts import EVERY, SCRIPT
from tests.support.processes import together
from tests.support.refusals import refused
from tests.support.traffic import Traffic

CPU = torch.device("cpu")
FRESH = ("method=mode", "method.start=fresh", "train.batch.size=8")
GRADIENTS = """
import json, sys
from functools import partial
from pathlib import Path
import torch
from mode.config.compose import compose
from mode.core.tensors import list_trainable
from mode.distributed.mpmd import MPMD
from mode.train.objective import Objective
from mode.train.loop import forward_backward
from mode.train.step_batch import StepBatch
from tests.distributed.test_mpmd import noisy
for settings in json.loads(sys.argv[1]):
    run = compose(settings, Path(sys.argv[2]))
    alone, placed = noisy(run), noisy(run)
    rows = torch.randint(300, (8, 33), generator=torch.Generator().manual_seed(1))
    most = 0.01  # gradients are clipped
    rows[:, 5::9] = 0  # documents end
    end = 0 if run.train.batch.intra_document_masking else None
    objective = Objective(alone, run.train, None, document_end=end)
    parts, parallelism = run.train.batch.gradient_accumulation_steps, run.train.parallelism
    forward_backward(objective, StepBatch(rows), parts * parallelism.microbatches_in_flight)
    torch.nn.utils.clip_grad_norm_(list_trainable(alone).values(), most)
    layout = MPMD(placed, torch.device("cpu"), parallelism.microbatches_in_flight, parallelism.placement)
    with layout.enter_step():
        objective = Objective(placed, run.train, None, layout.select_loss_rows, end)
        forward_backward(objective, StepBatch(layout.select_rows(rows)), parts, slots=layout.slots)
    layout.clip_gradients(most)
    parameters = list_trainable(placed)
    found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    own = [f".experts.{index - 1}." for index in layout.local if index]
    expected = {
        name: parameter.grad
        for name, parameter in list_trainable(alone).items()
        if ".experts." not in name or any(part in name for part in own)
    }
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.norm() > 0, name
        assert (found[name] - grad).norm() / grad.norm() < 1e-4, name
"""


def noisy(run: Any) -> Any:
    """Return a run's model with gates that prefer something and experts that differ from the backbone."""
    model = run.method.build(run, Material(backbone=lambda: load_model(run.backbone))).train()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=random)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        (
            2,
            [
                ("method.num_experts=2", "train.batch.gradient_accumulation_steps=2"),
                ("method.num_experts=1", "train.parallelism.microbatches_in_flight=4", "method.gate.balance=0.5"),
                ("method.num_experts=4", "method.gate.top_k=2"),
                (
                    "method.num_experts=4",
                    "train.parallelism.microbatches_in_flight=2",
                    "train.batch.intra_document_masking=true",
                    "train.parallelism.placement=[[1,3],[0,2,4]]",
                ),
            ],
        ),
        (
            4,
            [
                ("method.num_experts=1", "train.parallelism.microbatches_in_flight=2"),
                ("method.num_experts=2",),
                ("method.num_experts=4", "train.parallelism.placement=[[0,1],[2,3,4]]"),
                ("method.num_experts=3",),  # a process for every branch
            ],
        ),
    ],
)
def test_gradients_are_those_of_one_process(
    shared_world: World, tmp_path: Path, processes: int, cases: Sequence[Sequence[str]]
) -> None:
    world = shared_world.at(tmp_path)
    settings = [[*world.overrides, *FRESH, "train.parallelism.strategy=mpmd", *more] for more in cases]
    together(processes, GRADIENTS, json.dumps(settings), str(world.conf))


@pytest.mark.slow
def test_a_run_side_by_side_is_that_of_one_process(shared_world: World, tmp_path: Path) -> None:
    loop = ("method=mode", "train.steps=6", "train.batch.size=4", *EVERY)
    both, alone = (shared_world.at(tmp_path / name) for name in ("both", "alone"))
    asked = [
        *both.overrides,
        *loop,
        "train.parallelism.strategy=mpmd",
        "train.parallelism.microbatches_in_flight=2",
        "train.parallelism.placement=[[0],[1,2]]",
    ]
    together(2, SCRIPT, json.dumps([asked]), str(both.conf))
    # Stopped after its last step, and before its record: it goes on to the same.
    (record,) = (both.root / "results" / "records").glob("mode-py-sums-*.json")
    scores = json.loads(record.read_text())["happened"]["scores"]
    record.unlink()
    together(2, SCRIPT, json.dumps([asked]), str(both.conf))
    assert json.loads(record.read_text())["happened"]["scores"] == scores
    run = compose(asked, both.conf)
    other = compose([*alone.overrides, *loop], alone.conf)
    assert prepare_run(run).id == prepare_run(other).id  # the layout changes no result, so it is the same run
    for stage, single in zip([*run.method.needs(run), run], [*other.method.needs(other), other], strict=True):  # type: ignore[attr-defined]
        found, expected = execute(stage), execute(single)
        assert found.provenance["layout"] == {"kind": "mpmd", "processes": 2}
        losses = [[point["loss"] for point in record.happened["curve"]] for record in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        for domain, score in expected.happened["scores"].items():
            assert found.happened["scores"][domain]["loss"] == pytest.approx(score["loss"], rel=1e-4)
        weights, plain = (load_tensors(prepare_run(each).folder / WEIGHTS)[0] for each in (stage, single))
        for name, value in plain.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=2e-3)


@pytest.fixture
def alone_of_two(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One of two processes, the other of which is imagined."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(("blocks", "in_flight"), [(1, 1), (2, 1), (3, 1), (6, 1), (3, 2)])
@pytest.mark.usefixtures("alone_of_two")
def test_a_step_has_the_collectives_of_the_formula(world: World, blocks: int, in_flight: int) -> None:
    run: Any = compose([*world.overrides, *FRESH, f"method.num_blocks={blocks}"], world.conf)
    model = noisy(run)
    branches = MPMD(model, CPU, in_flight)
    objective = Objective(model, run.train, None, branches.select_loss_rows)
    with branches.enter_step(), Traffic() as seen:
        forward_backward(objective, StepBatch(torch.randint(300, (8, 33))), 1, slots=2)
    reduced = {"all_reduce": 2 * (blocks - 1) * in_flight} if blocks > 1 else {}
    assert seen.counts == reduced | {"reduce_scatter": in_flight, "all_gather": in_flight}
    assert {size for _, size in seen.found} == {
        8 * 32 * 16 * 4 // in_flight
    }  # rows, tokens, elements of a hidden state, bytes
    assert all(block.execution == Execution() for block in branches.blocks)


@pytest.mark.usefixtures("alone_of_two")
@pytest.mark.parametrize(
    ("settings", "anchored", "named"),
    [
        (["method=sft"], False, ("mpmd", "MoDE")),
        ([*FRESH, "method.gate.reads=output"], False, ("mpmd", "method.gate.reads=input")),
        ([*FRESH, "method.head_rank=2"], False, ("mpmd", "method.head_rank=0")),
        ([*FRESH], True, ("train.parallelism.strategy=mpmd", "ddp", "fsdp", "tp")),
    ],
)
def test_what_cannot_be_spread_is_refused(
    world: World, settings: list[str], anchored: bool, named: tuple[str, ...]
) -> None:
    run: Any = compose([*world.overrides, *settings, "train.parallelism.strategy=mpmd"], world.conf)
    model = run.method.build(run, Material(backbone=lambda: load_model(run.backbone)))
    with refused(*named):
        choose_layout(model, run.train, CPU, anchored=anchored)


@pytest.mark.usefixtures("alone_of_two")
def test_slots_have_as_even_work_as_can_be_or_what_is_asked(world: World) -> None:
    run: Any = compose([*world.overrides, *FRESH, "method.num_experts=4"], world.conf)
    model = noisy(run)
    branches = MPMD(model, CPU)
    assert branches.owners == [0, 0, 1, 0, 1]  # experts, which train, before the backbone
    asked = MPMD(model, CPU, placement=[[1, 2, 3], [4, 0]])
    assert asked.owners == [1, 0, 0, 0, 1]
    for wrong, told in (
        ([[0, 1], [2, 3]], "[0, 1, 2, 3, 4]"),
        ([[0, 1, 2], [2, 3, 4]], "[0, 1, 2, 3, 4]"),
        ([[0, 1, 2, 3, 4], []], "[0, 1, 2, 3, 4]"),
        ([[0], [1, 2], [3, 4]], "3 slots"),
        ([[0, 1, 2, 3, 4]], "1 slots"),
    ):
        with refused("train.parallelism.placement", told):
            MPMD(model, CPU, placement=wrong)


@pytest.mark.usefixtures("alone_of_two")
def test_a_wrong_placement_is_told_before_earlier_stages_train(world: World) -> None:
    asked = ("method=mode", "train.parallelism.strategy=mpmd", "train.parallelism.placement=[[0],[1]]")
    with refused("train.parallelism.placement", "[0, 1, 2]"):
        execute(compose([*world.overrides, *asked], world.conf))
    assert not list(world.root.rglob("curve.jsonl"))


@pytest.mark.parametrize(
    "setting", ["train.parallelism.microbatches_in_flight=2", "train.parallelism.placement=[[0],[1,2]]"]
)
def test_what_is_of_branches_side_by_side_alone_is_refused_elsewhere(world: World, setting: str) -> None:
    with refused("microbatches_in_flight", "placement", "strategy=mpmd", "ddp"):
        compose([*world.overrides, *FRESH, setting], world.conf)


def test_one_process_has_nothing_to_spread_over(world: World) -> None:
    run: Any = compose([*world.overrides, *FRESH, "train.parallelism.strategy=mpmd"], world.conf)
    with refused("train.parallelism.strategy=mpmd", "`mode launch --nproc 2"):
        execute(run)


@pytest.mark.usefixtures("alone_of_two")
def test_a_step_leaves_what_is_other_slots_in_other_slots(world: World) -> None:
    run: Any = compose(
        [*world.overrides, *FRESH, "method.num_experts=2", "train.parallelism.strategy=mpmd"], world.conf
    )
    model = noisy(run)
    whole = sum(each.numel() for each in model.parameters())
    parts = [*find_blocks(model)[0].experts, find_blocks(model)[0].backbone]
    own = [sum(each.numel() for each in part.parameters()) for part in parts]
    branches = MPMD(model, CPU, placement=[[0, 2], [1]])
    job = TrainJob(settings=run.train, steps=1, lr=1e-3, folder=world.root, validate=dict)
    made = Objective(model, run.train, None, branches.select_loss_rows)
    objective, optimizer = branches.wrap(
        made, partial(make_optimizer, lr=job.lr, scales=job.lr_scales, settings=job.settings)
    )
    with branches.enter_step():
        forward_backward(objective, StepBatch(torch.randint(300, (8, 33))), 1, slots=2)
    optimizer.step()
    left = sum(each.numel() for each in model.parameters())
    assert whole - left == own[0] * len(branches.blocks)
    assert not {id(each) for each in optimizer.state} & {id(each) for each in parts[0].parameters()}
    assert {id(each) for each in branches.find_local_parameters().values()} == {id(each) for each in optimizer.state}
    branches.gather_weights(False)
    assert sum(each.numel() for each in model.parameters()) == left
    branches.gather_weights(True)
    assert sum(each.numel() for each in model.parameters()) == whole


@pytest.mark.slow
def test_text_side_by_side_is_that_of_one_process_though_none_has_the_others_weights(
    shared_world: World, tmp_path: Path
) -> None:
    world = shared_world.at(tmp_path)
    run = compose([*world.overrides, *FRESH, "method.num_experts=1", "train.steps=2"], world.conf)
    record = execute(run, weights=True)
    words = [
        "generate",
        record.id,
        "def f",
        f"paths.runs={world.root}/runs",
        "--max-tokens",
        "12",
        "--conf",
        str(world.conf),
    ]
    alone = CliRunner().invoke(app, words)
    assert alone.exit_code == 0, alone.output
    command = [sys.executable, "-m", "cli", "launch", "--nproc", "2", *words, "--layout", "mpmd"]
    both = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert both.returncode == 0, both.stderr
    assert both.stdout == alone.stdout
    assert len(alone.stdout) > len("def f\n")


@pytest.mark.usefixtures("alone_of_two")
def test_a_process_forgets_the_branches_of_others(world: World) -> None:
    run = compose([*world.overrides, *FRESH, "method.num_experts=2"], world.conf)
    model = noisy(run)
    branches = MPMD(model, CPU, placement=[[0, 2], [1]])
    branches.distribute_for_generation()
    for block in branches.blocks:
        sizes = [sum(each.numel() for each in part.parameters()) for part in (block.backbone, *block.experts)]
        assert [size > 0 for size in sizes] == [True, False, True]


@pytest.mark.parametrize(("layout", "suggestion"), [("mpmd", "--layout mpmd"), ("mmpd", "mpmd")])
def test_a_layout_of_text_that_cannot_be_is_told(world: World, layout: str, suggestion: str) -> None:
    from cli.generate import spread_branches

    run = compose([*world.overrides, *FRESH], world.conf)
    with refused(f"--layout {layout}", suggestion=suggestion):
        spread_branches(noisy(run), layout)
