"""Merging by task vectors, held against another implementation, and against what its settings reduce it to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from baselines.merge import add_up, elect, thin, trim
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
    """Return one world for all of these tests, so that the branches are trained once."""
    return shared_world.at(tmp_path_factory.mktemp("merge"))


def draw(seed: int, count: int = 3) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        {"a": torch.randn(7, 5, generator=random), "b": 0.1 * torch.randn(11, generator=random)} for _ in range(count)
    ]


def merge_by_ties(vectors: list[dict[str, torch.Tensor]], density: float) -> np.ndarray:
    """TIES on flat vectors, element by element in plain Python, as the paper's three steps."""
    flat = [np.concatenate([part.numpy().ravel() for part in vector.values()]) for vector in vectors]
    trimmed = []
    for vector in flat:
        kept = set(np.argsort(-np.abs(vector), kind="stable")[: round(density * len(vector))].tolist())
        trimmed.append([float(value) if place in kept else 0.0 for place, value in enumerate(vector)])
    merged = []
    for values in zip(*trimmed, strict=True):
        positive = sum(value for value in values if value > 0)
        negative = -sum(value for value in values if value < 0)
        chosen = [value for value in values if value and (value > 0) == (positive > negative)]
        merged.append(sum(chosen) / len(chosen) if chosen else 0.0)
    return np.array(merged)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_ties_is_that_of_the_paper_on_flat_vectors(seed: int, density: float) -> None:
    vectors = draw(seed)
    merged = elect([trim(vector, density) for vector in vectors])
    found = np.concatenate([part.numpy().ravel() for part in merged.values()])
    np.testing.assert_allclose(found, merge_by_ties(vectors, density), atol=1e-6)


def test_one_vector_is_merged_to_itself() -> None:
    (vector,) = draw(3, count=1)
    for merged in (elect([trim(vector, 1.0)]), add_up([vector])):
        assert all(torch.equal(merged[name], part) for name, part in vector.items())


def test_dropping_keeps_the_share_and_the_expectation() -> None:
    vector = {"w": torch.linspace(0.5, 1.5, 200_000)}
    thinned = thin(vector, 0.9, torch.Generator().manual_seed(0))["w"]
    kept = thinned != 0
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.005)
    torch.testing.assert_close(thinned[kept], vector["w"][kept] / 0.1, rtol=1e-5, atol=0)
    assert float(thinned.mean()) == pytest.approx(1.0, abs=0.03)
    again = thin(vector, 0.9, torch.Generator().manual_seed(0))["w"]
    assert torch.equal(again, thinned)
    assert not torch.equal(thin(vector, 0.9, torch.Generator().manual_seed(1))["w"], thinned)


def run_of(world: World, *overrides: str) -> Any:
    return compose([*world.overrides, *overrides], world.conf)


def merged_weights(run: Any) -> dict[str, torch.Tensor]:
    execute(run)
    return dict(restore(prepare_run(run)).named_parameters())


@pytest.mark.slow
def test_task_arithmetic_stands_on_the_branches_of_btm(world: World) -> None:
    run = run_of(world, "method=task-arithmetic", "method.scale=0.7")
    btm = run_of(world, "method=btm")
    stages = [prepare_run(stage) for stage in run.method.needs(run)]
    assert [stage.id for stage in stages] == [prepare_run(stage).id for stage in btm.method.needs(btm)]
    found, before = merged_weights(run), dict(load_model(run.backbone).named_parameters())
    tuned = [load_tensors(stage.folder / WEIGHTS)[0] for stage in stages]
    for name, value in found.items():
        expected = before[name].double() + 0.7 * sum(each[name].double() - before[name].double() for each in tuned)
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["task-arithmetic", "ties", "dare"])
def test_without_scale_every_merge_is_the_backbone(world: World, name: str) -> None:
    run = run_of(world, f"method={name}", "method.scale=0")
    before = dict(load_model(run.backbone).named_parameters())
    assert all(torch.equal(value, before[key]) for key, value in merged_weights(run).items())


@pytest.mark.slow
def test_the_dropped_elements_are_those_of_the_seed(world: World) -> None:
    first, second = (merged_weights(run_of(world, "method=dare", f"seed={seed}")) for seed in (0, 1))
    again = merged_weights(run_of(world, "method=dare", "seed=0"))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_what_does_not_train_all_weights_and_a_useless_density_are_refused(world: World) -> None:
    run = run_of(world, "method=ties")
    lora = {"_target_": "baselines.lora.LoRA", "lr": 1e-3, "rank": 2, "alpha": 2, "target_modules": "attention"}
    with refused("method.branch._target_=baselines.lora.LoRA"):
        execute(replace_settings(run, method=replace_settings(run.method, branch=lora)))
    with refused("density goes with rule=ties"):
        run_of(world, "method=task-arithmetic", "method.density=0.5")
