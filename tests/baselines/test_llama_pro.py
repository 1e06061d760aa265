"""LLaMA Pro: a deeper model of the backbone's own family, whose copies start as the identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mode.backbone.load import load_model
from mode.config.compose import compose
from mode.methods.base import Material
from mode.runs.forecast import count_training_flops, forecast
from tests.conftest import World
from tests.support.refusals import refused

IDS = torch.tensor([[5, 17, 200, 3, 88, 41, 9, 120, 64]])


def build(world: World, *overrides: str) -> tuple[Any, Any]:
    run = compose([*world.overrides, "method=llama-pro", *overrides], world.conf)
    model: Any = run.method.build(run, Material(backbone=lambda: load_model(run.backbone)))
    return run, model


def test_every_group_ends_with_a_copy_that_is_the_identity(world: World) -> None:
    run, model = build(world, "method.num_blocks=2")
    bare = load_model(run.backbone)
    count = bare.config.num_hidden_layers
    layers = model.model.layers
    assert len(layers) == count + 2
    copies = [number for number, layer in enumerate(layers) if next(layer.parameters()).requires_grad]
    assert copies == [count // 2, count + 1]
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(count + 2))
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, bare.eval()(input_ids=IDS).logits)
    for number in copies:
        copied, before = dict(layers[number].named_parameters()), dict(layers[number - 1].named_parameters())
        changed = {name for name in copied if not torch.equal(copied[name], before[name])}
        assert changed == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}


def test_the_model_is_a_deeper_one_of_the_library(world: World) -> None:
    _, model = build(world)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_cost_is_that_of_the_model(world: World, groups: int) -> None:
    run, model = build(world, f"method.num_blocks={groups}")
    expected = forecast(run)
    assert expected is not None
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (expected.trainable, expected.added) == (trainable, trainable)
    assert expected.total == sum(parameter.numel() for parameter in model.parameters())
    assert expected.flops / expected.tokens == pytest.approx(count_training_flops(model, run.train), rel=1e-9)


def test_groups_that_do_not_divide_the_layers_are_refused(world: World) -> None:
    with refused("method.num_blocks=5"):
        build(world, "method.num_blocks=5")
