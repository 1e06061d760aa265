"""L2-SP and EWC: the penalty has its value and its gradient, and holds a model near its backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mode.backbone.load import load_model
from mode.config.compose import compose
from mode.config.train import Parallelism, Train
from mode.core.tensors import list_trainable
from mode.distributed import choose
from mode.ops.penalty import WeightPenalty, estimate_fisher
from mode.runs.execute import execute, restore
from mode.runs.prepare import prepare_run
from tests.conftest import World
from tests.support.refusals import refused


@pytest.fixture(scope="module")
def world(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return one world for all of these tests, so that the fine-tuning is trained once."""
    return shared_world.at(tmp_path_factory.mktemp("penalties"))


def run_of(world: World, *overrides: str) -> Any:
    return compose([*world.overrides, *overrides], world.conf)


def measure_distance(world: World, *overrides: str) -> float:
    """Return the squared distance of a trained model's weights from its backbone's."""
    run = run_of(world, *overrides)
    execute(run, weights=True)
    before = dict(load_model(run.backbone).named_parameters())
    after = dict(restore(prepare_run(run)).named_parameters())
    return sum((after[name] - value).square().sum().item() for name, value in before.items())


@pytest.mark.parametrize("importances", [False, True])
def test_the_penalty_and_its_gradient_are_those_by_hand(importances: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    factors = {name: torch.rand_like(value) for name, value in model.named_parameters()} if importances else None
    penalty = WeightPenalty(model, 0.5, None if factors is None else lambda: factors)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    value = penalty.auxiliary
    assert value is not None
    value.backward()
    total = 0.0
    for name, parameter in model.named_parameters():
        change, factor = parameter.detach() - start[name], 1.0 if factors is None else factors[name]
        total += 0.25 * float((factor * change.square()).sum())
        torch.testing.assert_close(parameter.grad, 0.5 * factor * change)
    assert value.item() == pytest.approx(total)
    assert penalty.eval().auxiliary is None
    assert not penalty.state_dict()


def test_the_fisher_information_is_the_mean_square_of_the_rows_gradients(world: World) -> None:
    model: Any = load_model(run_of(world).backbone).eval()
    rows = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(1))
    found = estimate_fisher(model, rows)
    name, parameter = next(iter(list_trainable(model).items()))
    expected = torch.zeros_like(parameter)
    for row in rows:
        chances = model(input_ids=row[None, :-1]).logits.log_softmax(-1)[0]
        (gradient,) = torch.autograd.grad(chances.gather(1, row[1:, None]).sum(), [parameter])
        expected += gradient.square() / len(rows) / 8
    torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-9)
    assert set(found) == set(list_trainable(model))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["l2-sp", "ewc"])
def test_without_weight_it_is_full_fine_tuning_and_with_more_it_stays_nearer(world: World, method: str) -> None:
    plain = execute(run_of(world, "method=sft"))
    none = execute(run_of(world, f"method={method}", "method.weight=0"))
    last = [record.outcome.curve[-1].values["loss"] for record in (none, plain)]
    assert last[0] == last[1]
    assert none.outcome.scores == plain.outcome.scores
    weights = ("1", "100") if method == "l2-sp" else ("100", "10000")
    distances = [measure_distance(world, "method=sft")]
    distances += [measure_distance(world, f"method={method}", f"method.weight={weight}") for weight in weights]
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < 0.9 * distances[0]


@pytest.mark.parametrize("strategy", ["fsdp", "tp"])
def test_shards_of_the_weights_are_refused(monkeypatch: pytest.MonkeyPatch, strategy: Any) -> None:
    monkeypatch.setattr(choose, "check_processes", lambda settings: None)
    model: Any = torch.nn.Linear(2, 2)
    model.weight_penalty = WeightPenalty(model, 1.0)
    with refused(f"train.parallelism.strategy={strategy}", "ddp"):
        choose.choose_layout(
            model, Train(parallelism=Parallelism(strategy=strategy)), torch.device("cpu"), anchored=False
        )
