"""Pruning experts: which go, what the rest says without them, and what is kept of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mode.artefacts.prune import choose_least, find_weighted_gates, mask_experts, rank_experts
from mode.artefacts.prune_results import COLLECTION, ORDERS
from mode.config.compose import compose
from mode.gating.meter import find_gates, watch_gates
from mode.modular.block import bypass_experts
from mode.runs.execute import build, execute, restore
from mode.runs.prepare import prepare_run
from tests.cli.test_cli import call
from tests.conftest import World

pytestmark = pytest.mark.slow
IDS = torch.tensor([[5, 17, 200, 3, 88, 41, 9, 120, 64]])


@pytest.fixture(scope="module")
def world(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    return shared_world.at(tmp_path_factory.mktemp("pruning"))


def finished(world: World, *overrides: str) -> tuple[Any, Any]:
    run = compose([*world.overrides, "method.lr=0.05", "train.steps=8", *overrides], world.conf)
    execute(run, weights=True)
    prepared = prepare_run(run)
    return prepared, restore(prepared).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_nothing_pruned_changes_nothing_and_everything_pruned_is_a_layer_that_says_nothing(world: World) -> None:
    _, model = finished(world, "method=upcycling")
    names, whole = list(find_weighted_gates(model)), logits(model)
    with mask_experts(model, {name: [] for name in names}):
        assert torch.equal(logits(model), whole)
    with mask_experts(model, {key: [0, 1, 2, 3] for key in names}):
        assert (model.model.layers[0].mlp(torch.randn(1, 3, 16)) == 0).all()
    assert torch.equal(logits(model), whole)


def test_a_pruned_expert_is_as_if_its_weights_were_nothing(world: World) -> None:
    _, model = finished(world, "method=upcycling")
    with mask_experts(model, {name: [2] for name in find_weighted_gates(model)}):
        pruned = logits(model)
    assert (pruned - logits(model)).abs().max() > 1e-4
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts[2].down_proj.weight.zero_()
    assert (pruned - logits(model)).abs().max() < 1e-5


def test_an_expert_that_no_token_chose_can_go(world: World) -> None:
    _, model = finished(world, "method=upcycling")
    one = IDS[:, :1]  # a single token has two experts of four in every layer
    with torch.no_grad(), watch_gates(model) as latest:
        whole = model(input_ids=one).logits
    idle = {
        name: (weights[0, 0] == 0).nonzero()[:, 0].tolist()
        for name, weights in zip(find_weighted_gates(model), latest, strict=True)
    }
    assert idle
    assert all(len(numbers) == 2 for numbers in idle.values())
    with mask_experts(model, idle), torch.no_grad():
        assert torch.equal(model(input_ids=one).logits, whole)


def test_what_a_gate_gave_to_a_pruned_expert_goes_to_the_rest(world: World) -> None:
    _, model = finished(world, "method=mode", "method.start=fresh", "method.num_experts=2")
    gates = find_gates(model)
    states = torch.randn(1, 4, 16)
    with mask_experts(model, {name: [1] for name in gates}), torch.no_grad():
        for gate in gates.values():
            found = gate(states)
            alone = (states @ gate.weight[:2].T + gate.bias[:2]).softmax(-1)  # type: ignore[index]
            torch.testing.assert_close(found[..., :2], alone)
            assert (found[..., 2] == 0).all()


def test_tokens_that_chose_pruned_experts_alone_have_the_backbone(world: World) -> None:
    settings = ("method=mode", "method.start=fresh", "method.num_experts=2", "method.gate.top_k=1")
    _, model = finished(world, *settings)
    with torch.no_grad():
        for gate in find_gates(model).values():
            gate.bias[2] = 1e4
    with bypass_experts(model):
        backbone = logits(model)
    with mask_experts(model, {name: [0, 1] for name in find_gates(model)}):
        torch.testing.assert_close(logits(model), backbone)


def test_orders_are_what_their_names_say(world: World) -> None:
    prepared, model = finished(world, "method=upcycling")
    before = find_weighted_gates(build(prepared, []))
    for name, gate in find_weighted_gates(model).items():
        norms = gate.weight.detach().norm(dim=1)  # type: ignore[union-attr, operator]
        torch.testing.assert_close(rank_experts("norm", prepared, model)[name], norms)
        change = norms - before[name].weight.detach().norm(dim=1)  # type: ignore[union-attr, operator]
        assert change.abs().max() > 0
        torch.testing.assert_close(rank_experts("change", prepared, model)[name], change)
        assert rank_experts("usage", prepared, model)[name].shape == (4,)
        first, again = (rank_experts("random", prepared, model)[name] for _ in range(2))
        assert torch.equal(first, again)
    assert choose_least(torch.tensor([0.3, 0.1, 0.2, 0.4]), 0.25) == [1]
    assert choose_least(torch.tensor([1.0, 1.0, 1.0]), 2 / 3) == [0, 1]


@pytest.mark.parametrize("method", ["btx", "mixlora", "mole", "moelora", "mode"])
def test_every_kind_of_mixture_can_be_pruned_and_reported(world: World, method: str) -> None:
    prepared, _ = finished(world, f"method={method}")
    result = call(world, "prune", prepared.id, "--ratio", "0", "--ratio", "0.5")
    assert result.exit_code == 0, result.output
    (found,) = [each for each in COLLECTION.read(world.root / "results") if each.asked["run"] == prepared.id]
    cases = found.happened["cases"]
    assert [(one["order"], one["ratio"]) for one in cases[1:]] == [(order, r) for order in ORDERS for r in (0.0, 0.5)]
    for one in cases[1::2]:
        assert one["accuracy"] == cases[0]["accuracy"]
    assert all(one["pruned"] > 0 for one in cases[2::2])
    assert found.asked["variant"] == "method.lr=0.05"
    record = execute(prepared.run)
    assert cases[0]["accuracy"]["py"] == record.happened["scores"]["py"]["accuracy"]
    assert call(world, "report", "pruning").exit_code == 0
    assert COLLECTION.stale(world.root / "results") == []
    assert call(world, "report", "pruning", "--html").exit_code == 0
    page = (world.root / "results" / "report.html").read_text("utf-8")
    assert '<section id="pruning">' in page
    assert prepared.id in page


def test_what_cannot_be_pruned_is_told_in_one_line(world: World) -> None:
    prepared, _ = finished(world, "method=sft")
    result = call(world, "prune", prepared.id)
    assert result.exit_code == 2
    assert result.stderr == f"mode: run {prepared.id}: SFT has no experts with a router to prune\n"
