"""Gates in closed form: linear discriminant analysis of what the gates read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mode.backbone.load import load_model
from mode.config.compose import compose
from mode.config.method import GateSettings
from mode.gating.gate import Gate
from mode.methods.base import Material
from mode.modular.block import find_blocks
from mode.modular.solved_gates import SHRINKAGE, ToldGate, solve_gates
from mode.runs.execute import build, execute
from mode.runs.prepare import prepare_run
from mode.runs.texts import read_texts
from tests.conftest import World
from tests.support.refusals import refused


def test_a_solved_gate_is_the_posterior_of_normal_texts() -> None:
    torch.manual_seed(0)
    texts = [torch.randn(1, 400, 4) + shift for shift in torch.tensor([[0.0] * 4, [2.0, 0, 0, 0], [0, 0, -2.0, 1.0]])]
    gate, told = Gate(4, 2), ToldGate(Gate(4, 2))
    for branch, text in enumerate(texts):
        told.branch = branch
        assert torch.equal(told(text).argmax(-1), torch.full((1, 400), branch))
    weight, bias = told.solve()
    with torch.no_grad():
        gate.weight.copy_(weight)
        gate.bias.copy_(bias)
    states = [text[0].double() for text in texts]
    means = torch.stack([each.mean(0) for each in states])
    within = torch.cat([each - mean for each, mean in zip(states, means, strict=True)])
    covariance = within.T @ within / len(within)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.trace() / 4 * torch.eye(4).double()
    for text in states:
        normal = [torch.distributions.MultivariateNormal(mean, shrunk).log_prob(text) for mean in means]
        expected = torch.stack(normal, dim=-1).softmax(-1)
        torch.testing.assert_close(gate(text.float()[None])[0], expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"scope": "prefix", "temperature": 2.0, "norm": True}, {"reads": "output"}])
def test_composed_gates_tell_texts_apart_without_a_step(world: World, settings: dict[str, Any]) -> None:
    asked = [f"method.gate.{name}={str(value).lower()}" for name, value in settings.items()]
    run: Any = compose([*world.overrides, "method=mode", "method.handover=solved", *asked], world.conf)
    assert run.method.gate == GateSettings(**settings)
    needs = [prepare_run(stage) for stage in run.method.needs(run)]
    for stage in needs:
        execute(stage.run, weights=True)
    model: Any = build(prepare_run(run), needs)
    assert all(type(module) is Gate for block in find_blocks(model) for module in [block.gate])
    before = [block.gate.weight.clone() for block in find_blocks(model)]
    texts = read_texts(run, 64)
    assert len(texts) == 3
    right = []
    for branch, rows in enumerate(texts):
        seen: list[torch.Tensor] = []
        hooks = [
            block.gate.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
            for block in find_blocks(model)
        ]
        with torch.no_grad():
            model.eval()(input_ids=rows)
        right.append(seen[0][..., branch].mean().item())
        for hook in hooks:
            hook.remove()
    assert min(right) > 1 / 3  # the mean weight of a text's own branch, in the first block
    solve_gates(model, texts)  # again, with the same result: it depends on the experts alone
    for block, weight in zip(find_blocks(model), before, strict=True):
        torch.testing.assert_close(block.gate.weight, weight)


def test_without_text_gates_cannot_be_solved() -> None:
    with refused("text"):
        Material(backbone=lambda: load_model(None)).read_texts(4)  # type: ignore[arg-type]
