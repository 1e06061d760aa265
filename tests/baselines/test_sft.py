"""Full fine-tuning: runs with different numbers of steps never share an id."""

from __future__ import annotations

from typing import Any

import pytest

from mode.config.compose import compose
from mode.runs.prepare import prepare_run
from tests.conftest import World


@pytest.mark.slow
@pytest.mark.parametrize("anchored", [False, True])
def test_budgets_with_the_same_steps_are_one_run_and_others_are_not(world: World, anchored: bool) -> None:
    steps: dict[str, int] = {}
    ids: dict[str, str] = {}
    for budget in ("paper", "data", "params", "compute"):
        words = ["method=sft", f"budget={budget}", "train.steps=80", *(["method.anchor.source=self"] * anchored)]
        run: Any = compose([*world.overrides, *words], world.conf)
        steps[budget], ids[budget] = run.method.steps(run), prepare_run(run).id
    assert {budget: ids[budget] == ids["paper"] for budget in steps} == {
        budget: steps[budget] == 80 for budget in steps
    }
    assert (steps["compute"] < 80) is anchored
