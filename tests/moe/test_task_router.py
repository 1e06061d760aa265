"""Experts weighed by the task: told, guessed from what came before, and alike for all tokens of a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from mode.backbone.load import load_model
from mode.config.compose import compose
from mode.gating.meter import find_gates
from mode.methods.base import Material
from mode.moe.low_rank import LowRankBank
from mode.moe.task_router import TaskRouter, Tasks
from mode.runs.execute import execute, restore
from mode.runs.prepare import prepare_run
from mode.train.objective import UNKNOWN, set_row_kinds
from tests.conftest import World
from tests.support.families import check_generation
from tests.support.models import compute_auxiliary_loss
from tests.support.refusals import refused

IDS = torch.tensor([[5, 17, 200, 3, 88, 41, 9, 120, 64], [7, 7, 30, 256, 1, 90, 12, 13, 250]])


def built(world: World, *overrides: str) -> Any:
    """Return a model whose experts say something already."""
    run: Any = compose([*world.overrides, "method=moelora", *overrides], world.conf)
    model = run.method.build(run, Material(backbone=lambda: load_model(run.backbone)))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LowRankBank):
                nn.init.normal_(module.up)
                nn.init.normal_(module.down, std=0.2)
    return model.eval()


@torch.no_grad()
def logits(model: Any, kind: int | None = None) -> torch.Tensor:
    if kind is not None:
        set_row_kinds(model, torch.tensor([kind]))
    return model(input_ids=IDS).logits


def test_the_experts_of_one_task_fold_into_one_adapter(world: World) -> None:
    model = built(world)
    told = [logits(model, kind) for kind in (0, 1)]
    assert (told[0] - told[1]).abs().max() > 1e-3
    banks = [module for module in model.modules() if isinstance(module, LowRankBank)]
    assert len(banks) == 6 * 7
    for kind, expected in enumerate(told):
        plain = load_model(compose([*world.overrides, "method=sft"], world.conf).backbone).eval()
        linears = [module for name, module in plain.named_modules() if name.endswith("_proj")]
        for bank, linear in zip(banks, linears, strict=True):
            router: Any = bank.router
            weights = functional.linear(model.tasks.embedding[kind], router.weight, router.bias).softmax(-1)
            linear.weight.data += bank.scale * torch.einsum("n,nor,nrd->od", weights, bank.up, bank.down).detach()
        with torch.no_grad():
            assert (plain(input_ids=IDS).logits - expected).abs().max() < 1e-4


def test_a_text_of_no_task_weighs_all_tasks_alike(world: World) -> None:
    model = built(world)
    unknown = logits(model, UNKNOWN)
    assert (unknown - logits(model, 0)).abs().max() > 1e-3
    set_row_kinds(model, None)  # type: ignore[arg-type]  # as in a model that is used without a word of tasks
    assert torch.equal(logits(model), unknown)
    logits(model, UNKNOWN)
    mean = torch.stack([model.tasks.embedding[None, kind] for kind in (0, 1)])
    router = next(module for module in model.modules() if isinstance(module, TaskRouter))
    each = functional.linear(mean[:, 0], router.weight, router.bias).softmax(-1)
    torch.testing.assert_close(router(torch.zeros(2, 3, 16))[0, 0], each.mean(0))


def test_one_expert_is_a_plain_adapter_of_every_task(world: World) -> None:
    model = built(world, "method.num_experts=1")
    assert torch.equal(logits(model, 0), logits(model, 1))


def test_a_guess_learns_the_task_from_the_prefix_and_its_loss_is_a_cross_entropy(world: World) -> None:
    tasks = Tasks(2, 8, guessed=True).train()
    words = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    kinds = torch.tensor([0, 1, 1, 0])
    rows = words[kinds][:, None] + 0.5 * torch.randn(4, 10, 8, generator=torch.Generator().manual_seed(1))
    set_row_kinds(tasks, kinds)
    optimizer = torch.optim.AdamW(tasks.parameters(), lr=0.1)
    losses = []
    for _ in range(50):
        tasks.weigh(rows, None, None)
        assert tasks.auxiliary is not None
        assert torch.equal(tasks.weights, functional.one_hot(kinds, 2).float()[:, None])  # type: ignore[arg-type]
        losses.append(tasks.auxiliary.item())
        tasks.auxiliary.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    assert losses[-1] < 0.1
    set_row_kinds(tasks.eval(), 1 - kinds)  # what is told is not believed after training
    tasks.weigh(rows, None, None)
    assert tasks.weights is not None
    assert torch.equal(tasks.weights[:, -1].argmax(-1), kinds)
    assert tasks.auxiliary is None


def test_the_guess_has_a_loss_in_training_alone(world: World) -> None:
    model = built(world, "method.task=guessed").train()
    set_row_kinds(model, torch.tensor([0, 1]))
    model(input_ids=IDS)
    assert compute_auxiliary_loss(model) is not None
    model.eval()(input_ids=IDS)
    assert compute_auxiliary_loss(model) is None


def test_what_is_told_of_routers_is_that_of_experts_alone(world: World) -> None:
    model = built(world, "method.task=guessed")
    routers = list(find_gates(model).values())
    assert routers
    assert all(isinstance(router, TaskRouter) for router in routers)


@pytest.mark.slow
def test_generation_with_padding_and_beams_is_that_without_a_cache(world: World) -> None:
    model = built(world, "method.task=guessed")
    nn.init.normal_(model.tasks.guess.weight, std=3.0)
    check_generation(model, IDS)


@pytest.mark.slow
def test_domains_are_scored_as_their_tasks_and_the_rest_as_none(world: World) -> None:
    from mode.runs.fit import score_domains

    run = compose([*world.overrides, "method=moelora", "train.steps=6", "method.lr=0.1"], world.conf)
    record, prepared = execute(run, weights=True), prepare_run(run)
    model: Any = restore(prepared)
    for domain, kind in {"py": 0, "sums": 1, "prose": UNKNOWN}.items():
        found = score_domains(prepared, model, "test", (domain,))[domain]
        assert found.loss == record.happened["scores"][domain]["loss"]
        assert model.tasks.row_kinds.tolist() == [kind]


def test_a_rank_that_does_not_divide_is_refused(world: World) -> None:
    with refused("rank=16", "num_experts=3"):
        compose([*world.overrides, "method=moelora", "method.num_experts=3"], world.conf)
