"""MoDE as a model: the equations, the gates, what is frozen, what it costs, and that nothing looks ahead."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mode.backbone.load import load_model
from mode.config.backbone import Backbone
from mode.modular.block import Block, find_blocks
from mode.modular.experts import compose_experts, extract_expert_state
from mode.modular.model import make_modular
from mode.ops.loss import compute_hidden_states, compute_next_token_loss, find_head
from tests.conftest import World
from tests.support.models import fingerprint_model
from tests.support.reference import mode_logits
from tests.support.refusals import refused

IDS = torch.tensor([[5, 17, 200, 3, 88, 41, 9, 120, 64], [7, 7, 30, 256, 1, 90, 12, 13, 250]])


def pico(world: World) -> Any:
    return load_model(Backbone(name="pico", path=str(world.conf.parent / "pico")))


def modular(world: World, *, seed: int = 1, num_experts: int = 2, **changes: Any) -> Any:
    """Return a modular pico backbone whose experts and gates are random, so that every part matters."""
    torch.manual_seed(seed)
    settings = {"num_blocks": 3, "expert_layers": 1, "init": "random", "backbone_bias": 0.0, **changes}
    model = make_modular(pico(world), experts=[f"e{number}" for number in range(num_experts)], **settings)
    with torch.no_grad():
        for block in find_blocks(model):
            block.gate.weight.normal_(0, 0.5)
            block.gate.bias.normal_(0, 0.5)
    return model.eval()


def force(model: Any, branch: int) -> None:
    """Make every gate choose one branch alone."""
    for block in find_blocks(model):
        with torch.no_grad():
            block.gate.weight.zero_()
            block.gate.bias.fill_(-1e4)
            block.gate.bias[branch] = 0.0


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    return model(input_ids=ids, **options).logits


@pytest.mark.parametrize(("num_experts", "num_blocks", "expert_layers"), [(1, 3, 1), (2, 2, 2), (3, 6, 1)])
def test_agrees_with_slow_reference(world: World, num_experts: int, num_blocks: int, expert_layers: int) -> None:
    model = modular(world, num_experts=num_experts, num_blocks=num_blocks, expert_layers=expert_layers)
    expected = mode_logits(model, IDS[0].tolist())
    assert (logits(model)[0].double() - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_agrees_with_slow_reference_on_other_families(family: str) -> None:
    from tests.backbone.test_families import IDS as FAMILY_IDS
    from tests.backbone.test_families import modular as of_family

    model = of_family(family)
    expected = mode_logits(model, FAMILY_IDS[0].tolist())
    assert (logits(model, FAMILY_IDS)[0].double() - expected).abs().max() < 1e-5


def test_gate_on_backbone_gives_the_backbone(world: World) -> None:
    model = modular(world)
    force(model, 0)
    assert (logits(model) - logits(pico(world).eval())).abs().max() < 1e-6


def test_gate_on_an_expert_gives_a_network_of_its_layers_alone(world: World) -> None:
    model = modular(world)
    force(model, 2)
    alone = pico(world)
    alone.model.layers = torch.nn.ModuleList(copy.deepcopy(block.experts[1][0]) for block in find_blocks(model))
    alone.config.num_hidden_layers = 3
    for index, layer in enumerate(alone.model.layers):
        layer.self_attn.layer_idx = index
    assert (logits(model) - logits(alone.eval())).abs().max() < 1e-6


def test_experts_that_copy_their_whole_block_make_gates_irrelevant(world: World) -> None:
    model = modular(world, init="copy", expert_layers=2)
    assert (logits(model) - logits(pico(world).eval())).abs().max() < 1e-5


def test_added_parameters_follow_the_closed_form(world: World) -> None:
    bare = pico(world)
    per_layer = sum(parameter.numel() for parameter in bare.model.layers[0].parameters())
    size, width = sum(parameter.numel() for parameter in bare.parameters()), bare.config.hidden_size
    for experts, blocks, layers in [(1, 2, 1), (2, 3, 1), (3, 3, 2)]:
        model = modular(world, num_experts=experts, num_blocks=blocks, expert_layers=layers)
        added = experts * blocks * layers * per_layer + blocks * (experts + 1) * (width + 1)
        assert sum(parameter.numel() for parameter in model.parameters()) - size == added
        assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == added


def test_composed_gates_keep_each_experts_odds(world: World) -> None:
    stage_one = [modular(world, seed=seed, num_experts=1) for seed in (3, 4)]
    composed = modular(world, seed=5)
    compose_experts(composed, [extract_expert_state(model, 0) for model in stage_one], "odds")
    for index, model in enumerate(stage_one):
        alone = copy.deepcopy(composed)
        for block in find_blocks(alone):
            with torch.no_grad():
                block.gate.weight[2 - index].zero_()
                block.gate.bias[2 - index] = -1e4
        assert (logits(alone) - logits(model)).abs().max() < 1e-5


def test_fresh_handover_leaves_gates_as_built(world: World) -> None:
    model = make_modular(pico(world), experts=["e0"], num_blocks=3, expert_layers=1, init="copy", backbone_bias=2.0)
    compose_experts(model, [extract_expert_state(modular(world, num_experts=1), 0)], "fresh")
    for block in find_blocks(model):
        assert torch.equal(block.gate.weight, torch.zeros_like(block.gate.weight))
        assert block.gate.bias.tolist() == [2.0, 0.0]


def test_backbone_stays_bit_identical_and_only_experts_and_gates_move(world: World) -> None:
    model = modular(world).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = compute_next_token_loss(compute_hidden_states(model, IDS[:, :-1]), find_head(model), IDS[:, 1:])
        loss.backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        trains = ".experts." in name or ".gate." in name
        assert torch.equal(value, before[name]) != trains, name
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".experts." in name or ".gate." in name), name


def test_first_blocks_backbone_needs_no_backward(world: World) -> None:
    model = modular(world).train()
    seen: list[bool] = []
    for block in find_blocks(model):
        block.backbone[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    compute_hidden_states(model, IDS)
    assert seen == [False, True, True]


def test_nothing_looks_ahead(world: World) -> None:
    model = modular(world)
    changed = IDS.clone()
    changed[:, 5:] = (changed[:, 5:] + 11) % 256
    assert torch.equal(logits(model)[:, :5], logits(model, changed)[:, :5])
    assert not torch.equal(logits(model)[:, 5:], logits(model, changed)[:, 5:])


def test_cached_decoding_equals_the_full_forward(world: World) -> None:
    model = modular(world, expert_layers=2)
    full, cache, steps = logits(model), None, []
    with torch.no_grad():
        for position in range(IDS.shape[1]):
            out = model(input_ids=IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert (torch.cat(steps, dim=1) - full).abs().max() < 1e-5
    assert len(cache.layers) == 6 + 3 * 2 * 2


def test_greedy_generation_equals_argmax_of_full_forwards(world: World) -> None:
    model = modular(world)
    made = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = IDS[:1]
    for _ in range(5):
        ids = torch.cat([ids, logits(model, ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(made, ids)


def test_random_experts_are_drawn_like_the_backbone_and_copied_ones_are_equal(world: World) -> None:
    fresh = modular(world, seed=1)
    weight = torch.cat([block.experts[0][0].mlp.up_proj.weight.flatten() for block in find_blocks(fresh)])
    assert weight.std().item() == pytest.approx(fresh.config.decoder.initializer_range, rel=0.1)
    assert torch.equal(find_blocks(fresh)[0].experts[0][0].input_layernorm.weight, torch.ones(16))
    copied = modular(world, init="copy")
    for block in find_blocks(copied):
        for name, value in block.experts[0][0].state_dict().items():
            assert torch.equal(value, block.backbone[0].state_dict()[name])


def test_same_seed_gives_the_same_experts_and_another_does_not(world: World) -> None:
    assert fingerprint_model(modular(world, seed=1)) == fingerprint_model(modular(world, seed=1))
    assert fingerprint_model(modular(world, seed=1)) != fingerprint_model(modular(world, seed=2))


def test_gate_weights_sum_to_one_and_depend_on_the_token(world: World) -> None:
    block = find_blocks(modular(world))[0]
    assert isinstance(block, Block)
    weights = block.gate(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(weights.sum(-1), torch.ones(2, 5))
    assert weights.std(dim=1).min() > 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_blocks": 4}, ("method.num_blocks=4", "[1, 2, 3, 6]")),
        ({"init": "copy", "expert_layers": 3}, ("method.expert_layers=3", "2 layers")),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(
    world: World, changes: dict[str, Any], named: tuple[str, ...]
) -> None:
    with refused(*named):
        modular(world, **changes)


def test_bf16_autocast_is_close_to_fp32(world: World) -> None:
    model = modular(world)
    with torch.autocast("cpu", torch.bfloat16):
        low = logits(model).float()
    assert (low - logits(model)).abs().max() < 0.1 * logits(model).abs().max()
