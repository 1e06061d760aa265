"""The choice of what forms activations again, by the memory that training may take."""

from __future__ import annotations

import re

import pytest

from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.core.tensors import digest_tensors
from mode.runs.execute import execute
from mode.train.memory import CHOICES
from mode.train.step_batch import StepBatch
from tests.conftest import World
from tests.support.refusals import refused
from tests.train.test_loop import curve_of, run_of

FRESH = ("method=mode", "method.start=fresh", "method.num_experts=1", "train.sequence_length=128")
AUTO = "train.memory.activation_checkpointing=auto"


def least(world: World) -> float:
    """Return the GB that a step takes at least, by what a run says that may take nothing."""
    with refused("train.memory.budget_gb=1e-06") as told:
        execute(run_of(world, *FRESH, AUTO, "train.memory.budget_gb=1e-6"))
    found = re.search(r"([\d.e-]+) GB", str(told.value))
    assert found
    return float(found[1])


@pytest.mark.slow
def test_the_fastest_choice_that_fits_is_taken_and_changes_no_bit(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mode.train.memory

    seen: list[str] = []
    genuine = mode.train.memory.choose_checkpointing
    monkeypatch.setattr(
        "mode.train.memory.choose_checkpointing", lambda *given: seen.append(genuine(*given)) or seen[-1]
    )
    smallest = least(world)
    curves = []
    for place, memory in (("much", 10.0), ("little", smallest * 1.01)):
        here = world.at(world.root / place)
        curves.append(curve_of(execute(run_of(here, *FRESH, AUTO, f"train.memory.budget_gb={memory}"))))
    plain = curve_of(execute(run_of(world.at(world.root / "plain"), *FRESH)))
    assert seen == ["none", "all"]
    assert curves == [plain, plain]


@pytest.mark.slow
def test_what_is_chosen_takes_less(world: World) -> None:
    """In order: each choice takes more than the one before where most layers are frozen."""
    from functools import partial

    import torch

    from mode.backbone.load import load_model
    from mode.core.device import measure_allocated
    from mode.methods.base import Material
    from mode.train.memory import make_step

    run = run_of(world, *FRESH)
    model = run.method.build(run, Material(backbone=partial(load_model, run.backbone))).train()
    before = digest_tensors(model.state_dict())
    rows = torch.randint(64, (2, 129))
    sizes = []
    for choice in CHOICES:
        chosen = replace_settings(run.train, **{"memory.activation_checkpointing": choice})
        sizes.append(
            measure_allocated(make_step(model, chosen, None, None, lambda: StepBatch(rows)), torch.device("cpu"))
        )
        model.zero_grad(set_to_none=True)
    assert sizes[0] < sizes[1] < sizes[2]
    assert digest_tensors(model.state_dict()) == before


@pytest.mark.parametrize("settings", [[AUTO], ["train.memory.budget_gb=4"]])
def test_memory_and_auto_go_together(world: World, settings: list[str]) -> None:
    with refused("activation_checkpointing=auto", "memory"):
        compose([*world.overrides, *settings], world.conf)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mixlora", "mole"])
def test_what_is_left_for_the_loss_keeps_no_activations(world: World, method: str) -> None:
    import torch

    from mode.core.device import measure_allocated
    from mode.ops.loss import find_auxiliary_modules
    from mode.runs.execute import build
    from mode.runs.prepare import prepare_run
    from mode.train.memory import make_step

    run = run_of(world, f"method={method}", "train.sequence_length=128", "train.steps=1")
    stages = run.method.needs(run)
    for stage in stages:
        execute(stage, weights=True)
    model = build(prepare_run(run), [prepare_run(stage) for stage in stages]).train()
    rows = torch.randint(64, (4, 129))
    sizes = []
    for choice in ("none", "all"):
        chosen = replace_settings(run.train, **{"memory.activation_checkpointing": choice})
        sizes.append(
            measure_allocated(make_step(model, chosen, None, None, lambda: StepBatch(rows)), torch.device("cpu"))
        )
        model.zero_grad(set_to_none=True)
    assert sizes[1] < 0.45 * sizes[0]
    modules = find_auxiliary_modules(model)
    assert modules
    assert all(module.auxiliary is None for module in modules)  # all have been formed again
