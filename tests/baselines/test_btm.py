"""BTM with one branch on all targets: a fine-tuned model beside its backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mode.backbone.load import load_model
from mode.config.compose import compose
from mode.core.files import WEIGHTS
from mode.core.tensors import load_tensors
from mode.runs.execute import execute, restore
from mode.runs.prepare import prepare_run
from tests.conftest import World
from tests.support.refusals import refused

MIX = "method.branch_data=mix"


def run_of(world: World, *overrides: str) -> Any:
    return compose([*world.overrides, "method=btm", *overrides], world.conf)


@pytest.mark.slow
def test_one_branch_on_the_mix_is_the_fine_tuned_model(world: World) -> None:
    run = run_of(world, MIX)
    record = execute(run, weights=True)
    sft = prepare_run(compose([*world.overrides, "method=sft"], world.conf))
    assert record.provenance["needs"] == [sft.id]
    model: Any = restore(prepare_run(run))
    untouched, tuned = model.members
    before, (after, _) = dict(load_model(run.backbone).named_parameters()), load_tensors(sft.folder / WEIGHTS)
    assert all(torch.equal(value, before[name]) for name, value in untouched.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in tuned.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert run.method.branches(run) == ("backbone", "mix")


def test_it_runs_two_models_for_a_token_whatever_the_number_of_targets(world: World) -> None:
    one = run_of(world, "method=backbone").method.cost(run_of(world))
    for targets, apart in (("[py]", 2), ("[py,sums]", 3)):
        for overrides, count in (([MIX], 2), ([], apart)):
            run = run_of(world, f"targets={targets}", *overrides)
            cost = run.method.cost(run)
            assert (cost.flops.forward, cost.total) == (count * one.flops.forward, count * one.total)


@pytest.mark.parametrize("budget", ["paper", "data", "compute"])
def test_its_branch_has_all_steps_under_every_budget(world: World, budget: str) -> None:
    run = run_of(world, MIX, f"budget={budget}")
    (stage,) = run.method.needs(run)
    assert prepare_run(stage).id == prepare_run(compose([*world.overrides, "method=sft"], world.conf)).id
    assert prepare_run(run).id == prepare_run(run_of(world, MIX)).id != prepare_run(run_of(world)).id


@pytest.mark.parametrize("setting", ["window=8", "top_k=1"])
@pytest.mark.parametrize("combine", ["uniform", "average"])
def test_settings_of_the_posterior_are_refused_without_it(world: World, setting: str, combine: str) -> None:
    with refused(setting.partition("=")[0], "combine=posterior"):
        run_of(world, f"method.combine={combine}", f"method.{setting}")
