"""WiSE-FT: the ends of its line are the backbone and the fine-tuned model, and it stands on the ordinary run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mode.backbone.load import load_model
from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.core.files import WEIGHTS
from mode.core.tensors import load_tensors
from mode.runs.execute import execute, restore
from mode.runs.prepare import prepare_run
from tests.conftest import World
from tests.support.refusals import refused


@pytest.fixture(scope="module")
def world(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return one world for all of these tests, so that the fine-tuning is trained once."""
    return shared_world.at(tmp_path_factory.mktemp("wise"))


def run_of(world: World, *overrides: str) -> Any:
    return compose([*world.overrides, "method=wise-ft", *overrides], world.conf)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_every_weight_is_on_the_line_from_the_backbone_to_the_tuned_model(world: World, alpha: float) -> None:
    run = run_of(world, f"method.alpha={alpha}")
    record = execute(run)
    sft = prepare_run(compose([*world.overrides, "method=sft"], world.conf))
    before, (after, _) = dict(load_model(run.backbone).named_parameters()), load_tensors(sft.folder / WEIGHTS)
    for name, value in restore(prepare_run(run)).named_parameters():
        expected = (1 - alpha) * before[name].double() + alpha * after[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-7)
        if alpha in (0, 1):
            assert torch.equal(value, after[name] if alpha else before[name])
    assert record.provenance["needs"] == [sft.id]
    assert record.outcome.scores == execute(sft.run).outcome.scores or alpha < 1


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["paper", "data", "compute"])
def test_its_fine_tuning_has_all_steps_under_every_budget(world: World, budget: str) -> None:
    run = run_of(world, f"budget={budget}")
    (stage,) = run.method.needs(run)
    assert prepare_run(stage).id == prepare_run(compose([*world.overrides, "method=sft"], world.conf)).id
    assert prepare_run(run).id == prepare_run(run_of(world)).id


def test_what_does_not_train_all_weights_is_refused(world: World) -> None:
    run = run_of(world)
    lora = {"_target_": "baselines.lora.LoRA", "lr": 1e-3, "rank": 2, "alpha": 2, "target_modules": "attention"}
    with refused("method.tuned._target_=baselines.lora.LoRA"):
        execute(replace_settings(run, method=replace_settings(run.method, tuned=lora)))
