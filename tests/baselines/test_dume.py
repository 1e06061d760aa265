"""DUME: routers by ridge regression over the feed-forward parts of fine-tuned copies."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from mode.backbone.load import load_model
from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.config.method import RouterSettings
from mode.methods.base import Material
from mode.methods.stages import merge_branches
from mode.moe.feed_forward import insert_feed_forward_banks
from mode.moe.solved_routers import ToldRouter
from mode.runs.execute import execute
from mode.runs.prepare import prepare_run
from mode.runs.texts import read_texts
from tests.conftest import World


def test_a_solved_router_is_ridge_regression_and_texts_add_up() -> None:
    random = np.random.default_rng(0)
    texts = [random.normal(size=(40, 5)) + 2.0 * np.eye(5)[number] for number in range(3)]
    whole, added = ToldRouter(5, 3), ToldRouter(5, 3)
    for number, text in enumerate(texts):
        whole.expert = added.expert = number
        weights = whole(torch.from_numpy(text)[None])
        assert weights.shape == (1, 40, 3)
        assert torch.equal(weights.argmax(-1), torch.full((1, 40), number))
    for number in (2, 0, 1):  # in another order, and in parts
        added.expert = number
        for part in np.split(texts[number], 4):
            added(torch.from_numpy(part)[None])
    # Ridge regression is least squares on data with sqrt(ridge) I appended.
    inputs = np.concatenate([*texts, np.sqrt(0.1) * np.eye(5)])
    answers = np.concatenate([np.eye(3).repeat(40, axis=0), np.zeros((5, 3))])
    expected = np.linalg.lstsq(inputs, answers, rcond=None)[0].T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    torch.testing.assert_close(whole.solve(0.1), torch.from_numpy(expected).float())
    torch.testing.assert_close(added.solve(0.1), whole.solve(0.1))


@pytest.mark.slow
def test_every_layer_reads_what_its_experts_texts_give_it(world: World) -> None:
    run: Any = compose([*world.overrides, "method=dume", "method.rows=8"], world.conf)
    needs = [prepare_run(stage) for stage in run.method.needs(run)]
    for stage in needs:
        execute(stage.run, weights=True)
    folders = tuple(stage.folder for stage in needs)
    material = Material(lambda: load_model(run.backbone), folders, texts=partial(read_texts, run))
    model: Any = run.method.build(run, material)
    assert not [name for name, value in model.named_parameters() if value.requires_grad]
    # The inputs of a layer, from models whose feed-forward parts are all of one expert.
    texts = read_texts(run, 8)
    found: list[list[torch.Tensor]] = []
    for number, rows in enumerate(texts):
        alone, states = merge_branches(material)
        insert_feed_forward_banks(alone, [states[number]], RouterSettings())
        seen: list[torch.Tensor] = []
        layers: Any = alone.model.layers
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])) for layer in layers
        ]
        with torch.no_grad():
            alone.eval()(input_ids=rows)
        for hook in hooks:
            hook.remove()
        found.append([each.flatten(0, 1).double() for each in seen])
    for number, layer in enumerate(model.model.layers):
        inputs = torch.cat([each[number] for each in found])
        experts = torch.repeat_interleave(torch.arange(3), torch.tensor([len(each[number]) for each in found]))
        answers = torch.nn.functional.one_hot(experts).double()
        weight = torch.linalg.solve(inputs.T @ inputs + 0.1 * torch.eye(inputs.shape[1]).double(), inputs.T @ answers).T
        expected = weight / weight.norm(dim=1, keepdim=True)
        torch.testing.assert_close(layer.mlp.router.weight.double(), expected, rtol=1e-3, atol=1e-4)
    told = (layer.mlp.router(inputs.float()).argmax(-1) == experts).double().mean()
    assert told > 0.6  # three texts, by the last layer's inputs


@pytest.mark.slow
def test_its_cost_is_a_forward_pass_of_btx(world: World) -> None:
    run: Any = compose([*world.overrides, "method=dume"], world.conf)
    btx: Any = compose([*world.overrides, "method=btx", "method.router.top_k=1"], world.conf)
    mine, theirs = run.method.cost(run), btx.method.cost(btx)
    assert (mine.flops.forward, mine.flops.backward, mine.trainable) == (theirs.flops.forward, 0.0, 0)
    assert (mine.total, mine.active, mine.added) == (theirs.total, theirs.active, theirs.added)
    soft = replace_settings(run.method, router=RouterSettings())
    assert soft.cost(run).active == mine.total
