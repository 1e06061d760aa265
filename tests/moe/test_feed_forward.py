"""Feed-forward layers as experts: Sparse Upcycling and BTX."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mode.backbone.load import load_model
from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.config.method import RouterSettings
from mode.core.files import WEIGHTS
from mode.core.tensors import average_weights, load_tensors
from mode.gating.router import Router
from mode.methods.base import Material
from mode.moe.attention import insert_attention_banks
from mode.moe.feed_forward import GATED, FeedForwardBank, LowRankFeedForward, insert_feed_forward_banks
from mode.runs.execute import execute
from mode.runs.prepare import prepare_run
from tests.conftest import World
from tests.cost.test_cost import check
from tests.support.families import FAMILIES, make_model
from tests.support.models import compute_auxiliary_loss
from tests.support.refusals import refused

IDS = torch.tensor([[5, 17, 200, 3, 88, 41, 9, 120, 64]])


def run_of(world: World, *overrides: str) -> Any:
    return compose([*world.overrides, *overrides], world.conf)


def built(run: Any, needs: Any = ()) -> Any:
    return run.method.build(run, Material(backbone=lambda: load_model(run.backbone), needs=tuple(needs)))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def bank(count: int = 3, **settings: Any) -> FeedForwardBank:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8)) for _ in range(count)]
    return FeedForwardBank(experts, Router(8, count, RouterSettings(**settings), std=1.0))


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_k": 1, "renormalize": False}, {"top_p": 0.6}])
def test_an_expert_runs_on_its_tokens_and_the_sum_is_as_if_on_all(settings: dict[str, Any]) -> None:
    made, x = bank(**settings), torch.randn(2, 5, 8)
    weights = made.router(x)
    expected = sum(weights[..., i, None] * expert(x) for i, expert in enumerate(made.experts))
    torch.testing.assert_close(made(x), expected)


def test_a_bank_with_top_two_is_mixtrals_block() -> None:
    from transformers import MixtralConfig
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    shape = MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2)
    torch.manual_seed(0)
    shape.mlp_bias = False
    made = FeedForwardBank([LlamaMLP(shape) for _ in range(3)], Router(8, 3, RouterSettings(top_k=2), std=1.0))
    theirs: Any = MixtralSparseMoeBlock(shape)
    with torch.no_grad():
        theirs.gate.weight.copy_(made.router.weight)
        for index, expert in enumerate(made.experts):
            assert isinstance(expert, LlamaMLP)
            both = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
            theirs.experts.gate_up_proj[index].copy_(both)
            theirs.experts.down_proj[index].copy_(expert.down_proj.weight)
        x = torch.randn(2, 5, 8)
        torch.testing.assert_close(made(x), theirs(x))


def test_an_expert_that_no_token_chose_has_a_gradient_of_zero() -> None:
    made = bank(top_k=1)
    made.router.weight.data.zero_()
    made.router.weight.data[0, 0] = 9.0
    made(torch.ones(1, 4, 8)).sum().backward()
    assert all((parameter.grad == 0).all() for parameter in made.experts[2].parameters())  # type: ignore[union-attr]
    assert any((parameter.grad != 0).any() for parameter in made.experts[0].parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("router", [{"top_k": 2}, {}, {"top_p": 0.5}])
def test_equal_experts_are_the_dense_layer_for_any_router(world: World, router: dict[str, Any]) -> None:
    run = run_of(world, "method=sft")
    model = load_model(run.backbone)
    insert_feed_forward_banks(model, [None] * 4, RouterSettings(**router))
    for module in model.modules():
        if isinstance(module, Router):
            nn.init.normal_(module.weight)
    assert (logits(model) - logits(load_model(run.backbone))).abs().max() < 1e-5


def test_unnormalised_weights_scale_the_layer_by_what_the_chosen_experts_hold(world: World) -> None:
    run = run_of(world, "method=upcycling")
    model, x = built(run), torch.randn(1, 4, 16)
    made = model.model.layers[0].mlp
    dense = load_model(run.backbone).model.layers[0].mlp
    mass = made.router(x).sum(-1, keepdim=True)
    assert (mass < 1).all()
    torch.testing.assert_close(made(x), mass * dense(x))


def test_copies_grow_apart_by_the_tokens_that_chose_them(world: World) -> None:
    model = built(run_of(world, "method=upcycling")).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    first, second = (expert.down_proj.weight.grad for expert in model.model.layers[0].mlp.experts[:2])
    assert (first - second).abs().max() > 0


def test_the_balance_loss_is_its_weight_in_every_layer_where_the_load_is_even(world: World) -> None:
    model = built(
        run_of(world, "method=upcycling", "method.router.top_k=null", "method.router.renormalize=true")
    ).train()
    for module in model.modules():
        if isinstance(module, Router):
            nn.init.zeros_(module.weight)
    model(input_ids=IDS)
    found = compute_auxiliary_loss(model)
    assert found is not None
    assert found.item() == pytest.approx(0.01 * len(model.model.layers), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_feed_forward_part(family: str) -> None:
    model, twin = make_model(family), make_model(family)
    twin.load_state_dict(model.state_dict())
    insert_feed_forward_banks(model, [None, None], RouterSettings(top_k=1))
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        difference = model.eval()(input_ids=ids).logits - twin.eval()(input_ids=ids).logits
    assert difference.abs().max() < 1e-5


@pytest.fixture(scope="module")
def mixed(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[Any]]:
    """Return BTX's run, its model before it trains, and the weights of backbone and branches."""
    world = shared_world.at(tmp_path_factory.mktemp("btx"))
    run = run_of(world, "method=btx")
    stages = [prepare_run(stage) for stage in run.method.needs(run)]
    for stage in stages:
        execute(stage.run, weights=True)
    folders = [stage.folder for stage in stages]
    own = dict(load_model(run.backbone).named_parameters())
    return run, built(run, folders), [own, *(load_tensors(folder / WEIGHTS)[0] for folder in folders)]


@pytest.mark.slow
def test_btx_has_the_branches_feed_forward_parts_and_the_mean_of_all_else(mixed: Any) -> None:
    _, model, states = mixed
    found = dict(model.named_parameters())
    for index, state in enumerate(states):
        for name, value in state.items():
            if ".mlp." in name:
                assert torch.equal(found[name.replace(".mlp.", f".mlp.experts.{index}.")], value)
    for name, value in average_weights(states).items():
        if ".mlp." not in name:
            torch.testing.assert_close(found[name], sum(state[name] for state in states) / 3)
            assert torch.equal(found[name], value)


@pytest.mark.slow
def test_btx_stands_on_the_fine_tuning_that_anyone_runs(mixed: Any, shared_world: World) -> None:
    run, _, _ = mixed
    alone = run_of(shared_world, "method=sft", "targets=[py]")
    assert prepare_run(run.method.needs(run)[0]).id == prepare_run(alone).id


def test_where_btx_draws_an_expert_all_run_in_the_first_layer(mixed: Any) -> None:
    run, _, _ = mixed
    assert run.method.soft_layers == 1
    router = replace_settings(run.method.router, top_k=None, sample=True)
    drawn = replace_settings(run, method=replace_settings(run.method, router=router))
    assert prepare_run(drawn).id != prepare_run(replace_settings(drawn, method=unsoftened(drawn.method))).id
    assert prepare_run(run).id == prepare_run(replace_settings(run, method=unsoftened(run.method))).id
    model = built(drawn, [prepare_run(stage).folder for stage in run.method.needs(run)])
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, inputs, weights: seen.append(weights))
    model(input_ids=torch.arange(8)[None])
    first, *others = [(weights > 0).sum(-1).unique().tolist() for weights in seen]
    assert (first, others) == ([3], [[1]] * (len(seen) - 1))
    check(drawn, model)


def unsoftened(method: Any) -> Any:
    """Return BTX with every layer alike."""
    return replace_settings(method, soft_layers=0)


def test_what_btx_takes_follows_the_closed_form(mixed: Any) -> None:
    run, model, _ = mixed
    check(run, model)
    frozen = replace_settings(run, method=replace_settings(run.method, train_experts=False))
    for module in model.modules():
        if isinstance(module, FeedForwardBank):
            module.experts.requires_grad_(False)
    check(frozen, model)


def test_sharing_what_the_frozen_matrices_make_is_as_if_every_expert_were_whole(world: World) -> None:
    run = run_of(world, "method=mixlora", "method.num_experts=3", "method.rank=2")
    made = built(run).model.layers[1].mlp
    for factor in made.up.values():
        nn.init.normal_(factor)
    x = torch.randn(2, 5, 16)
    weights, expected = made.router(x), torch.zeros_like(x)
    for index in range(3):
        expert = copy.deepcopy(made.base)
        for name in GATED:
            change = made.scale * made.up[name][index] @ made.down[name][index]
            getattr(expert, name).weight.data.add_(change)
        expected = expected + weights[..., index, None] * expert(x)
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)


def test_a_part_that_is_not_gated_is_refused_in_one_line() -> None:
    with refused("GPT2MLP", "gate_proj"):
        LowRankFeedForward(make_model("gpt2").transformer.h[0].mlp, 2, 2, 1.0, Router(16, 2))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 3])
def test_equal_attention_experts_are_the_models_own_and_decode_with_a_cache(family: str, count: int) -> None:
    model, twin = make_model(family).eval(), make_model(family).eval()
    twin.load_state_dict(model.state_dict())
    banks = insert_attention_banks(model, [dict(twin.named_parameters())] * count, RouterSettings())
    for made in banks:
        nn.init.normal_(made.router.weight)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        expected = twin(input_ids=ids).logits
        assert (model(input_ids=ids).logits - expected).abs().max() < 1e-5
        for made in banks:  # experts that differ have keys and values of their own
            for expert in made.experts[1:]:
                for value in expert.parameters():
                    value.add_(torch.randn_like(value) * 0.1)
        first = model(input_ids=ids[:, :6], use_cache=True)
        rest = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values).logits
        assert (rest - model(input_ids=ids).logits[:, 6:]).abs().max() < 1e-4


@pytest.mark.slow
def test_bam_mixes_attention_of_branches_and_may_share_their_keys(world: World) -> None:
    run = run_of(world, "method=bam")
    for stage in run.method.needs(run):
        execute(stage, weights=True)
    needs = [prepare_run(stage).folder for stage in run.method.needs(run)]
    states = [dict(load_model(run.backbone).named_parameters()), *(load_tensors(path / WEIGHTS)[0] for path in needs)]
    average, key = average_weights(states), "model.layers.1.self_attn.k_proj.weight"
    model = built(run, needs)
    check(run, model)
    attention = model.model.layers[1].self_attn
    for expert, state in zip(attention.experts, states, strict=True):
        assert torch.equal(expert.k_proj.weight, state[key])
    assert torch.equal(model.model.layers[1].input_layernorm.weight, average["model.layers.1.input_layernorm.weight"])
    shared = built(run_of(world, "method=bam", "method.shares_keys=true"), needs).model.layers[1].self_attn
    assert all(torch.equal(expert.k_proj.weight, average[key]) for expert in shared.experts)
    assert len({id(expert.v_proj) for expert in shared.experts}) == 1
    assert torch.equal(shared.experts[2].q_proj.weight, states[2][key.replace("k_proj", "q_proj")])
    x = torch.randn(1, 4, 16)
    made = model.model.layers[0].mlp
    weights = made.router(x)
    assert ((weights > 0).sum(-1) == 1).all()  # one expert a token, times its probability
    assert (weights.sum(-1) < 1).all()


def test_bam_refuses_to_choose_among_attention_experts(world: World) -> None:
    with refused("attention_router", "top_k"):
        run_of(world, "method=bam", "method.attention_router.top_k=1")
