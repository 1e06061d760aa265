"""Routers and banks of experts: conventions, losses, and what one expert or equal ones come to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from mode.backbone.load import load_model
from mode.config.check import build_method
from mode.config.compose import compose
from mode.config.method import RouterSettings
from mode.gating.router import LocalizedRouter, Router, compute_localized_balance
from mode.methods.base import Material, Method
from mode.moe.low_rank import BalanceLoss, LowRankBank, OutputGatedBank, VectorBank, replace_linears
from mode.runs.execute import execute, restore
from mode.runs.prepare import prepare_run
from mode.train.objective import set_row_kinds
from tests.conftest import World
from tests.cost.test_cost import check
from tests.support.refusals import refused

IDS = torch.tensor([[5, 17, 200, 3, 88, 41, 9, 120, 64]])


def router(count: int = 4, **settings: Any) -> Router:
    torch.manual_seed(1)
    return Router(8, count, RouterSettings(**settings), std=1.0).train()


def states() -> torch.Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))


def test_top_k_before_the_softmax_is_top_k_after_it_renormalised() -> None:
    made = router(top_k=2)
    logits = states() @ made.weight.T
    best = logits.topk(2, -1)
    expected = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
    torch.testing.assert_close(made(states()), expected)
    kept = router(top_k=2, renormalize=False)(states())
    torch.testing.assert_close(kept.sum(-1), logits.softmax(-1).topk(2, -1).values.sum(-1))
    assert ((kept > 0).sum(-1) == 2).all()


def test_top_p_keeps_the_fewest_experts_that_hold_the_share() -> None:
    dense, counts = router()(states()), []
    torch.testing.assert_close(router(top_p=1.0)(states()), dense)
    for p in (1e-6, 0.3, 0.6, 0.9, 1.0):
        kept = router(top_p=p, renormalize=False)(states())
        chosen = kept > 0
        assert (kept.sum(-1) >= p - 1e-6).all()
        smallest = torch.where(chosen, dense, torch.inf).amin(-1)
        assert (kept.sum(-1) - smallest < p).all()  # one fewer would not do
        counts.append(chosen.sum().item())
    assert counts == sorted(counts)
    assert counts[0] == states().shape[0] * states().shape[1]


def test_localized_balance_is_of_proportions_and_nothing_where_scaled_loads_are_even() -> None:
    torch.manual_seed(0)
    weights, kinds = torch.rand(5, 7, 6), torch.tensor([0, 1, 1, 0, 1])
    loss = compute_localized_balance(weights, kinds, 0.3)
    torch.testing.assert_close(compute_localized_balance(weights * 8, kinds, 0.3), loss)
    own = torch.tensor([0, 0, 0, 1, 1, 1])
    factors = torch.where(own[None] == kinds[:, None], 1.3, 0.7)
    loads = weights.sum(1) * factors
    torch.testing.assert_close(loss, ((loads - loads.mean()) ** 2).mean() / loads.mean() ** 2)
    even = (1 / factors)[:, None].expand(5, 7, 6)  # more of a row for the experts of the other kind
    assert compute_localized_balance(even, kinds, 0.3) < 1e-10
    assert compute_localized_balance(even, 1 - kinds, 0.3) > 0.1


def test_a_localized_router_has_a_loss_only_where_it_knows_the_kinds_of_rows() -> None:
    made = LocalizedRouter(8, 4, balance=0.5, spread=0.1)
    made(states())
    assert made.auxiliary is None
    set_row_kinds(nn.ModuleList([made]), torch.tensor([0, 1, 1]))
    weights = made(states())
    torch.testing.assert_close(made.auxiliary, 0.5 * compute_localized_balance(weights, torch.tensor([0, 1, 1]), 0.1))
    assert made.eval()(states()).shape == (3, 5, 4)
    assert made.auxiliary is None


@pytest.mark.slow
def test_kinds_of_rows_are_those_of_their_source_and_reach_every_micro_batch(world: World) -> None:
    run = compose([*world.overrides, "method=loramoe", "train.batch.replay={prose: 0.25}"], world.conf)
    assert isinstance(run.method, Method)
    assert run.method.row_kinds(run) == {"py": 1, "sums": 1, "prose": 0}
    alone = compose([*world.overrides, "method=loramoe"], world.conf)
    assert run.method.row_kinds(alone) == {"py": 0, "sums": 1}
    losses = []
    for balance in (0.0, 100.0):
        asked = [
            *world.overrides,
            "method=loramoe",
            f"method.balance={balance}",
            "train.batch.gradient_accumulation_steps=2",
        ]
        record = execute(compose(asked, world.conf))
        losses.append([point["loss"] for point in record.happened["curve"]])
    assert losses[0] != losses[1]  # the constraint moved the routers, and so the next losses


def test_a_drawn_expert_has_weight_one_and_the_gradient_of_its_probability() -> None:
    made = router(sample=True)
    logits = states() @ made.weight.T
    torch.manual_seed(7)
    weights = made(states())
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    assert (weights.sum(-1) == 1).all()
    torch.manual_seed(7)
    assert torch.equal(made(states()), weights)
    draws = torch.stack([made(states()).detach() for _ in range(2000)]).mean(0)
    assert (draws - logits.softmax(-1)).abs().max() < 0.05  # the Gumbel trick draws by probability
    made.zero_grad()
    (weights * torch.randn(weights.shape)).sum().backward()
    assert made.weight.grad is not None
    assert made.weight.grad.abs().sum() > 0
    settled = made.eval()(states())
    assert torch.equal(settled.argmax(-1), logits.argmax(-1))
    for other in ({"top_k": 1}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match=r"sample.*top_k.*top_p"):
            RouterSettings(sample=True, **other)


def test_losses_of_a_router_are_what_their_names_say() -> None:
    logits = states() @ router().weight.T
    weights = logits.softmax(-1)
    expected = {
        "z": logits.logsumexp(-1).square().mean(),
        "entropy": -(weights * weights.log()).sum(-1).mean(),
        "balance": 4 * weights.mean((0, 1)).square().sum(),
    }
    for name, value in expected.items():
        made = router(**{name: 0.5})
        made(states())
        torch.testing.assert_close(made.auxiliary, 0.5 * value)
        made.eval()(states())
        assert made.auxiliary is None
    even = Router(8, 4, RouterSettings(balance=0.01, top_k=2), std=0.0).train()
    even.weight.data.copy_(torch.eye(4, 8))
    even(torch.eye(4, 8) + torch.eye(4, 8).roll(1, 0))  # every expert gets as many tokens
    assert even.auxiliary.item() == pytest.approx(0.01, rel=1e-5)  # type: ignore[union-attr]


def bank(count: int, rank: int = 3) -> LowRankBank:
    torch.manual_seed(0)
    made = LowRankBank(nn.Linear(8, 6), count, rank, 0.5, Router(8, count, std=1.0))
    nn.init.normal_(made.up)
    return made


def test_a_low_rank_bank_mixes_outputs_and_not_factors() -> None:
    made, x = bank(4), states()
    weights = made.router(x)
    each = [x @ made.down[i].T @ made.up[i].T for i in range(4)]
    expected = made.base(x) + 0.5 * sum(weights[..., i, None] * each[i] for i in range(4))
    torch.testing.assert_close(made(x), expected)
    down, up = (torch.einsum("...n,nab->...ab", weights, part) for part in (made.down, made.up))
    factors = made.base(x) + 0.5 * (up @ (down @ x[..., None])).squeeze(-1)
    assert (made(x) - factors).abs().max() > 1e-2


def test_one_expert_is_lora() -> None:
    made, x = bank(1), states()
    torch.testing.assert_close(made(x), made.base(x) + 0.5 * x @ made.down[0].T @ made.up[0].T)


@pytest.mark.parametrize("before", [False, True])
def test_one_vector_is_ia3_and_equal_vectors_need_no_router(before: bool) -> None:
    x = states()
    one = VectorBank(nn.Linear(8, 6), 1, Router(8 if before else 6, 1), before=before)
    many = VectorBank(one.base, 5, Router(8 if before else 6, 5, std=1.0), before=before)
    nn.init.normal_(one.scales)
    many.scales.data.copy_(one.scales.expand(5, -1))
    expected = one.base(x * one.scales[0]) if before else one.base(x) * one.scales[0]
    torch.testing.assert_close(one(x), expected)
    torch.testing.assert_close(many(x), expected, rtol=1e-5, atol=1e-6)


def test_the_vectors_of_mov_are_peft_s(world: World) -> None:
    from peft import IA3Config, inject_adapter_in_model

    run = compose([*world.overrides, "method=mov", "method.num_experts=1"], world.conf)
    ours: Any = run.method.build(run, Material(backbone=lambda: load_model(run.backbone)))  # type: ignore[attr-defined]
    names = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    theirs: Any = inject_adapter_in_model(IA3Config(**names), load_model(run.backbone))  # type: ignore[arg-type]
    torch.manual_seed(0)
    for name, module in ours.named_modules():
        if isinstance(module, VectorBank):
            nn.init.normal_(module.scales)
            twin = theirs.get_submodule(name).ia3_l["default"]
            twin.data.copy_(module.scales.detach().view_as(twin))
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_one_expert_of_molora_is_peft_s_lora(world: World) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    settings = ["method.num_experts=1", "method.rank=4", "method.alpha=16"]
    run = compose([*world.overrides, "method=molora", *settings], world.conf)
    ours: Any = run.method.build(run, Material(backbone=lambda: load_model(run.backbone)))  # type: ignore[attr-defined]
    layers = [name for name, module in ours.named_modules() if isinstance(module, LowRankBank)]
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=layers)
    theirs: Any = inject_adapter_in_model(lora, load_model(run.backbone))
    torch.manual_seed(0)
    for name, module in ours.named_modules():
        if isinstance(module, LowRankBank):
            nn.init.normal_(module.up, std=0.1)
            twin = theirs.get_submodule(name)
            twin.lora_A["default"].weight.data.copy_(module.down[0])
            twin.lora_B["default"].weight.data.copy_(module.up[0])
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_an_unknown_layer_is_told_with_the_nearest(world: World) -> None:
    run = compose([*world.overrides, "method=sft"], world.conf)
    with refused("q_porj", suggestion="q_proj"):
        replace_linears(load_model(run.backbone), ["q_porj"], lambda path, base: base)


def test_a_bank_works_on_layers_that_keep_their_weight_the_other_way_round() -> None:
    from transformers.pytorch_utils import Conv1D

    made = LowRankBank(Conv1D(6, 8), 2, 3, 1.0, Router(8, 2))
    assert made(states()).shape == (3, 5, 6)
    assert functional.mse_loss(made(states()), made.base(states())) == 0


def test_the_balance_of_a_ledger_is_over_all_layers_and_least_where_all_experts_weigh_the_same() -> None:
    torch.manual_seed(0)
    ledger = BalanceLoss(0.5)
    banks = [OutputGatedBank(nn.Linear(8, 6), torch.randn(3, 2, 8), torch.randn(3, 6, 2), 1.0, ledger) for _ in "ab"]
    for made in banks:
        made(states())
    assert banks[0].auxiliary is None
    assert banks[1].auxiliary is not None
    assert banks[1].auxiliary.item() == pytest.approx(0.5 * 3 * math.log(3), rel=1e-5)
    for made in banks:
        nn.init.normal_(made.gate.weight)
        made(states())
    first, second = (made.mean for made in banks)
    assert first is not None
    expected = -0.5 * ((first + second) / 2).log().sum()
    torch.testing.assert_close(banks[1].auxiliary, expected)
    assert banks[1].auxiliary.item() > 0.5 * 3 * math.log(3)
    banks[1].eval()(states())
    assert banks[1].auxiliary is None


@pytest.mark.slow
def test_one_expert_of_mole_is_that_lora(world: World) -> None:
    overrides = [*world.overrides, "targets=[py]"]
    lora = compose([*overrides, "method=lora"], world.conf)
    mole = compose([*overrides, "method=mole"], world.conf)
    (stage,) = mole.method.needs(mole)  # type: ignore[attr-defined]
    assert prepare_run(stage).id == prepare_run(lora).id
    execute(lora, weights=True)
    trained: Any = restore(prepare_run(lora))
    material = Material(backbone=lambda: load_model(mole.backbone), needs=(prepare_run(stage).folder,))
    mixed = mole.method.build(mole, material)  # type: ignore[attr-defined]
    with torch.no_grad():
        bare = load_model(mole.backbone)(input_ids=IDS).logits
        expected = trained.eval()(input_ids=IDS).logits
        torch.testing.assert_close(mixed.eval()(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - bare).abs().max() > 1e-4


@pytest.mark.slow
def test_what_gates_over_loras_take_follows_the_closed_form(world: World) -> None:
    run: Any = compose([*world.overrides, "method=mole"], world.conf)
    stages = [prepare_run(stage) for stage in run.method.needs(run)]
    for stage in stages:
        execute(stage.run, weights=True)
    folders = tuple(stage.folder for stage in stages)
    model = run.method.build(run, Material(backbone=lambda: load_model(run.backbone), needs=folders))
    check(run, model)


def test_experts_of_mole_have_to_be_low_rank() -> None:
    sft = {"_target_": "baselines.sft.SFT", "lr": 1.0}
    with refused("experts", "baselines.lora.LoRA"):
        build_method({"_target_": "baselines.mole.MoLE", "lr": 1.0, "balance": 0.0, "experts": sft})
