"""The planner: its operations are those of `cost`, its limits are right, and it says what is best and why."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from typer.testing import CliRunner

from cli.app import app
from mode.backbone.load import load_model
from mode.backbone.shape import Flops, read_shape
from mode.config.compose import compose
from mode.distributed.fsdp import FSDP
from mode.methods.base import Material
from mode.planning.layouts import estimate_ddp, estimate_fsdp, estimate_mpmd, list_placements
from mode.planning.machine import Device, Link, read_machine
from mode.planning.plan import estimate_layouts, summarise_estimates
from mode.planning.work import Branch, Work, describe_work, scale_tokens
from mode.train.loop import forward_backward
from mode.train.objective import Objective
from mode.train.optimizer import make_optimizer
from mode.train.step_batch import StepBatch
from tests.cli.test_cli import call
from tests.conftest import World
from tests.support.refusals import check_refused, refused
from tests.support.traffic import Traffic

FREE = Link(bandwidth=1e30, latency=0.0)
H100 = Device(flops=4e14, memory=80e9)
PAIR = (((0,), 8), ((1,), 8))


def work(backbone: str, *overrides: str, tokens: int = 65536, length: int = 4096) -> Work:
    fresh = ("method=mode", "method.start=fresh", "method.num_experts=1", f"train.sequence_length={length}")
    return scale_tokens(describe_work(compose([*fresh, f"backbone={backbone}", *overrides])), tokens)


@pytest.mark.parametrize(
    "settings",
    [*(("method.start=fresh", f"method.num_experts={count}") for count in (1, 2, 4)), ("method.train_experts=false",)],
)
def test_operations_and_weights_are_those_of_the_closed_form(settings: tuple[str, ...]) -> None:
    run = compose(["method=mode", "backbone=llama-8b", "method.expert_layers=2", *settings])
    method: Any = run.method
    cost, whole = method.cost(run), describe_work(run).whole
    assert whole.flops.total == pytest.approx(cost.flops.total, rel=1e-12)
    assert (whole.weights, whole.trained) == (cost.total, cost.trainable)


@pytest.mark.parametrize("method", ["sft", "lora", "molora"])
def test_methods_of_one_branch_are_planned_too(method: str) -> None:
    run = compose([f"method={method}", "backbone=llama-1b"])
    settings: Any = run.method
    cost, whole = settings.cost(run), describe_work(run).whole
    assert (whole.flops, whole.weights, whole.trained) == (cost.flops, cost.total, cost.trainable)
    assert [one.layout for one in estimate_layouts(describe_work(run), 8, H100, FREE)] == ["ddp", "fsdp"]


def test_a_method_that_does_not_say_what_it_takes_is_refused() -> None:
    with refused("MixLoRA", "`cost`"):
        describe_work(compose(["method=mixlora", "method.router.top_k=null", "method.router.top_p=0.4"]))


def test_one_device_sends_nothing_and_computes_everything() -> None:
    step = work("llama-1b")
    for each in (estimate_ddp, estimate_fsdp):
        found = each(step, 1, H100, Link(bandwidth=1e9, latency=1e-3))
        assert found.traffic == 0
        assert found.seconds == pytest.approx(found.computing)
        assert found.computing == pytest.approx(step.tokens * step.whole.flops.total / H100.flops)


def test_a_planned_backbone_is_never_drawn(tmp_path: Path) -> None:
    run = compose(["backbone=llama-70b", f"paths.cache={tmp_path}"])
    assert read_shape(run.backbone).parameters == pytest.approx(70.6e9, rel=0.01)
    assert not list(tmp_path.iterdir())


def test_traffic_is_that_of_the_collectives() -> None:
    frozen, trained = Branch(Flops(1.0, 0.0), 100, 0, 1, 0.0), Branch(Flops(1.0, 2.0), 40, 40, 1, 0.0)
    passed, head = Branch(Flops(1.0, 1.0), 100, 0, 1, 0.0), Branch(Flops(1.0, 1.0), 10, 0, 1, 0.0)
    step = Work(((frozen, trained), (passed, trained)), head, hidden=8, tokens=64)
    # All-reduce of 80 gradients in fp32: twice 3/4 of their bytes.
    assert estimate_ddp(step, 4, H100, FREE).traffic == 2 * 4 * 80 * 3 / 4
    # Gathered forward: all; backward: but for head and the first block's frozen part; reduce-scattered: what trains.
    assert estimate_fsdp(step, 4, H100, FREE).traffic == (2 * (290 + 180) + 4 * 80) * 3 / 4
    # Slots of two: their own volume within; and between, three sums of 8 numbers a token: each sends half, twice.
    slots = (((0,), 2), ((1,), 2))
    backbone, expert = 2 * (210 + 100) / 2, (2 * (90 + 80) + 4 * 80) / 2
    exchange = 3 * 2 * (1 / 2) * 2 * 8 * (64 / 2)
    assert estimate_mpmd(step, slots, 1, H100, FREE).traffic == max(backbone, expert) + exchange


MIXED = "method=mode method.start=fresh method.num_experts=3 method.num_blocks=2"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*FSDP")
@pytest.mark.parametrize(
    "settings", ["method=sft", "method=lora", "method=upcycling", MIXED, f"{MIXED} method.num_blocks=1"]
)
def test_what_is_sent_in_shards_is_what_torch_sends(
    world: World, monkeypatch: pytest.MonkeyPatch, settings: str
) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    run: Any = compose([*world.overrides, *settings.split(), "train.batch.size=4"], world.conf)
    model = run.method.build(run, Material(backbone=lambda: load_model(run.backbone)))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        layout, make = FSDP(model), partial(make_optimizer, lr=1.0, scales={}, settings=run.train)
        objective, _ = layout.wrap(Objective(model, run.train, None), make)
        with Traffic() as seen, layout.enter_step():
            forward_backward(objective, StepBatch(torch.zeros(1, 33, dtype=torch.long)), 1)
    finally:
        distributed.destroy_process_group()
    assert estimate_fsdp(replace(describe_work(run), half=4), 4, H100, FREE).traffic == seen.bytes * 3 / 4


def test_a_block_ends_with_its_slowest_slot_unless_micro_batches_fill_the_wait() -> None:
    slow, quick = Branch(Flops(3.0, 0.0), 1, 0, 1, 0.0), Branch(Flops(1.0, 0.0), 1, 0, 1, 0.0)
    nothing = Branch(Flops(), 0, 0, 0, 0.0)
    step = Work(((slow, quick), (quick, slow)), nothing, hidden=1, tokens=100)
    one = Device(flops=1.0, memory=1e9)
    slots = (((0,), 1), ((1,), 1))
    assert estimate_mpmd(step, slots, 1, one, FREE).computing == pytest.approx(600.0)
    assert estimate_mpmd(step, slots, 4, one, FREE).computing == pytest.approx(450.0)
    assert estimate_mpmd(step, slots, 10**9, one, FREE).computing == pytest.approx(400.0)


def test_every_placement_uses_every_device_and_every_branch_once() -> None:
    step = work("llama-1b", "method.num_experts=4")
    found = list(list_placements(step, 8))
    assert (((0,), 4), ((1, 3), 2), ((2, 4), 2)) in found
    assert (((0,), 4), ((1,), 1), ((2,), 1), ((3,), 1), ((4,), 1)) in found
    for slots in found:
        assert sum(devices for _, devices in slots) == 8
        assert sorted(index for chosen, _ in slots for index in chosen) == [0, 1, 2, 3, 4]
    assert not list(list_placements(step, 1))


def test_side_by_side_wins_where_weights_are_most_of_what_is_sent() -> None:
    """Few tokens a device and a slow link for shards; the same ratio as an independent derivation of the model gave."""
    ratios = []
    for tokens in (512, 2048, 8192, 32768):
        step = work("llama-8b", "method.expert_layers=4", tokens=16 * tokens)
        link = read_machine(Link, "link", "nvlink")
        ratios.append(estimate_mpmd(step, PAIR, 1, H100, link).seconds / estimate_fsdp(step, 16, H100, link).seconds)
    assert ratios == pytest.approx([0.57, 1.17, 1.23, 1.24], abs=0.01)


def test_the_verdict_names_the_best_and_says_when_side_by_side_is_out_of_reach() -> None:
    link = read_machine(Link, "link", "nvlink")
    large, small = work("llama-8b", tokens=16 * 4096), work("llama-8b", tokens=16 * 128)
    told = summarise_estimates(large, estimate_layouts(large, 16, H100, link), 16, H100)
    assert told.startswith("best: ddp, bound by computing; mpmd cannot win: even with free traffic")
    tight = Device(flops=4e14, memory=25e9)  # a copy of the backbone does not fit
    assert summarise_estimates(small, estimate_layouts(small, 16, tight, link), 16, tight).startswith("best: mpmd")
    none = Device(flops=4e14, memory=1e6)
    assert summarise_estimates(small, estimate_layouts(small, 16, none, link), 16, none).startswith("no layout fits")


@pytest.mark.slow
def test_a_plan_is_printed_and_mistakes_are_told(world: World, tmp_path: Path) -> None:
    asked = ["plan", "backbone=llama-1b", "--devices", "16", "--link", "ib"]
    result = call(world, *asked)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["layout", "ddp", "fsdp", "mpmd"]
    assert lines[4].startswith("best: ")
    wrong = call(world, "plan", "--device", "h10")
    check_refused(wrong, "--device h10", "h100?")
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "mine.yaml").write_text("flops: -1\nmemory: 1e9\n")
    with refused("device/mine.yaml", "flops"):
        read_machine(Device, "device", "mine", tmp_path)


THREE = (((0,), 4), ((1, 2), 2), ((3, 4), 2))
"""Slots of the paper's Figure 4a: the backbone on four devices, pairs of experts on two."""
FIVE = (((0,), 4), ((1,), 1), ((2,), 1), ((3,), 1), ((4,), 1))
APART = (((0,), 6), ((1,), 1), ((2,), 1))


def side_by_side(slots: Any, experts: int, num_blocks: int, expert_layers: int, tokens: int) -> float:
    """Return the predicted time of a step side by side over that in shards, on the paper's devices and backbone."""
    settings = (f"method.num_experts={experts}", f"method.num_blocks={num_blocks}")
    step = work("paper-1.6b", *settings, f"method.expert_layers={expert_layers}", tokens=tokens, length=1024)
    device, link = read_machine(Device, "device", "tpuv5e"), read_machine(Link, "link", "ici")
    return estimate_mpmd(step, slots, 1, device, link).seconds / estimate_fsdp(step, 8, device, link).seconds


@pytest.mark.slow
def test_the_published_speed_up_is_that_of_few_tokens_a_step() -> None:
    """Figure 4 of the paper, which does not tell its tokens a step; docs/sharding.md has these figures."""
    tokens = (1024, 4096, 8192, 16384)
    assert [side_by_side(THREE, 4, 2, 3, each) for each in tokens] == pytest.approx([0.26, 0.65, 1.16, 1.30], abs=0.01)
    assert side_by_side(FIVE, 4, 2, 3, 4096) == pytest.approx(0.65, abs=0.01)
    layers = [side_by_side(APART, 2, 2, each, 4096) for each in (2, 3, 4, 5)]
    assert layers == pytest.approx([0.92, 1.04, 1.12, 1.18], abs=0.01)
    merges = [side_by_side(THREE, 4, blocks, 6 // blocks, 4096) for blocks in (2, 3, 6)]
    assert merges == pytest.approx([0.65, 0.64, 0.63], abs=0.01)


@pytest.mark.slow
def test_curves_are_the_plans_of_every_size_and_link(tmp_path: Path) -> None:
    import pandas as pd

    from mode.report.plan_figures import DEVICES, TOKENS, write_plan

    works = {name: work(name) for name in ("llama-1b", "llama-8b")}
    links = {name: read_machine(Link, "link", name) for name in ("ib", "ethernet")}
    paths = write_plan(works, links, H100, tmp_path / "new")
    assert [path.name for path in paths] == ["plan.csv", "plan-time.png", "plan-memory.png"]
    found = pd.read_csv(paths[0])
    assert len(found) == len(works) * len(links) * len(DEVICES) * len(TOKENS) * 3
    row = found[(found["backbone"] == "llama-8b") & (found["link"] == "ib") & (found["devices"] == 64)].iloc[-1]
    expected = estimate_layouts(scale_tokens(works["llama-8b"], 64 * TOKENS[-1]), 64, H100, links["ib"])[-1]
    assert (row["layout"], row["placement"]) == (expected.layout, expected.placement)
    assert row["ms"] == pytest.approx(1e3 * expected.seconds, abs=1e-3)
    for path in paths[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_machine_is_measured_and_planned_with(tmp_path: Path) -> None:
    (mine := tmp_path / "mine").mkdir()
    told = CliRunner().invoke(app, ["plan", "backbone=tiny", "--calibrate", "here", "--conf", str(mine)])
    assert told.exit_code == 0, told.output
    device, link = read_machine(Device, "device", "here", mine), read_machine(Link, "link", "here", mine)
    assert 1e8 < device.flops < 1e13
    assert 1e9 < device.memory < 1e13
    assert 1e7 < link.bandwidth < 1e12


def test_measuring_needs_a_folder_to_write_to() -> None:
    told = CliRunner().invoke(app, ["plan", "--calibrate", "here"])
    assert told.exit_code == 2
    assert "--conf FOLDER" in told.output
