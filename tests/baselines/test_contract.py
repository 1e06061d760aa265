"""What every method promises, over every YAML in conf/method."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mode.backbone.load import load_model
from mode.config.compose import compose
from mode.config.groups import list_members
from mode.config.method import Choice
from mode.core.tensors import list_trainable
from mode.methods.base import Material, Method
from mode.modular.block import find_blocks
from mode.ops.loss import compute_hidden_states, compute_next_token_loss, find_head
from mode.runs.execute import build, execute, restore
from mode.runs.prepare import prepare_run
from mode.train.objective import set_row_kinds
from tests.conftest import World
from tests.support.models import compute_auxiliary_loss, fingerprint_model

IDS = torch.tensor([[5, 17, 200, 3, 88, 41, 9, 120, 64], [7, 7, 30, 256, 1, 90, 12, 13, 250]])
SAMPLED = ("method.router.top_k=null", "method.router.renormalize=true", "method.router.sample=true")
VARIANTS: dict[str, tuple[str, ...]] = {
    "mode-1x-uninit": ("method=mode", "method.start=fresh", "method.num_experts=1"),
    "mode-2x-uninit": ("method=mode", "method.start=fresh"),
    "mode-head": ("method=mode", "method.start=fresh", "method.head_rank=4"),
    "mode-2x-frozen": ("method=mode", "method.train_experts=false"),
    "mode-2x-data": ("method=mode", "budget=data", "train.steps=6"),
    "btm-average": ("method=btm", "method.combine=average"),
    "moelora-guessed": ("method=moelora", "method.task=guessed"),
    "upcycling-sampled": ("method=upcycling", *SAMPLED),
    "btx-sampled": ("method=btx", *SAMPLED),
    "flex-olmo-tuned": ("method=flex-olmo", "method.tune_router=true"),
    "flex-olmo-expert-all": ("method=flex-olmo-expert", "method.shared=all"),
    "upcycling-top-p": ("method=upcycling", "method.router.top_k=null", "method.router.top_p=0.4"),
    **{name: (f"method={name}",) for name in list_members("method") if name != "pretrain"},
}
QUICK = ("mode", "sft", "lora", "backbone")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS]
"""Every variant; those of the quick round stand for the others."""


@pytest.fixture(scope="module")
def world(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return one world for all of these tests, so that a stage that several methods stand on is trained once."""
    return shared_world.at(tmp_path_factory.mktemp("contract"))


def method_of(name: str) -> Method:
    """Return the method of a variant, which says what the suite may expect of it."""
    method = compose(VARIANTS[name]).method
    assert isinstance(method, Method)
    return method


def that(holds: Callable[[Method], bool]) -> list[Any]:
    """Return the variants whose method has a property; there has to be one."""
    found = [param for param in ALL if holds(method_of(str(param.values[0])))]
    assert found
    return found


def run_of(world: World, name: str, *overrides: str) -> Any:
    return compose([*world.overrides, *VARIANTS[name], *overrides], world.conf)


def built(world: World, name: str) -> Any:
    """Return a method's model as it is before its own stage trains."""
    run = run_of(world, name)
    prepared = prepare_run(run)
    needs = [prepare_run(stage) for stage in prepared.method.needs(run)]
    for stage in needs:
        execute(stage.run, weights=True)
    return build(prepared, needs)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("name", that(lambda method: method.identical_at_start))
def test_starts_as_the_backbone(world: World, name: str) -> None:
    bare = load_model(run_of(world, name).backbone)
    tolerance = 1e-5 if method_of(name).weighs_experts else 1e-6  # weights that sum to one, but for the last bits
    assert (logits(built(world, name)) - logits(bare)).abs().max() < tolerance


@pytest.mark.parametrize("name", ALL)
def test_nothing_looks_ahead(world: World, name: str) -> None:
    model, changed = built(world, name), IDS.clone()
    changed[:, 5:] = (changed[:, 5:] + 11) % 256
    if method_of(name).groups_tokens:
        difference = logits(model.double())[:, :5] - logits(model, changed)[:, :5]
        assert difference.abs().max() < 1e-12
    else:
        assert torch.equal(logits(model)[:, :5], logits(model, changed)[:, :5])


@pytest.mark.parametrize("name", ALL)
def test_decoding_with_a_cache_is_the_same(world: World, name: str) -> None:
    model = built(world, name).eval()
    parts, cache = [], None
    with torch.no_grad():
        for piece in (IDS[:, :4], IDS[:, 4:5], IDS[:, 5:]):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert (torch.cat(parts, dim=1) - logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_exactly_what_is_declared_trains_and_the_rest_stays_bit_identical(world: World, name: str) -> None:
    model = built(world, name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = set(list_trainable(model))
    run = run_of(world, name)
    if not run.method.steps(run):
        assert not names
        return
    optimizer = torch.optim.AdamW(list_trainable(model).values(), lr=1e-2)
    losses = []
    set_row_kinds(model, torch.tensor([0, 1]))
    for _ in range(20):
        loss = compute_next_token_loss(compute_hidden_states(model, IDS[:, :-1]), find_head(model), IDS[:, 1:])
        extra = compute_auxiliary_loss(model)
        torch.autograd.backward(loss if extra is None else loss + extra)
        losses.append(loss.item())
        assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == names
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    tied = "lm_head.weight" if "model.embed_tokens.weight" in names else ""
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved <= names | {tied}
    # A gate's weight cannot move while all branches agree; everything else that trains has to.
    assert {key for key in names if not key.endswith(("q_proj.weight", "k_proj.weight"))} <= moved


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_trained_weights_restore_to_the_scores_of_the_record(world: World, name: str) -> None:
    from mode.runs.fit import score_domains

    run = run_of(world, name)
    record = execute(run, weights=True)
    prepared = prepare_run(run)
    scores = score_domains(prepared, restore(prepared), "test")
    for domain, value in scores.items():
        assert value.accuracy == record.happened["scores"][domain]["accuracy"]
        assert value.loss == record.happened["scores"][domain]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_records_say_how_experts_were_weighed(world: World, name: str) -> None:
    run = run_of(world, name)
    record = execute(run)
    assert ("gates" in record.happened) == run.method.weighs_experts
    # Of several choices, such as those of two routers, the one that keeps most experts is the bound.
    choices = [value for value in vars(run.method).values() if isinstance(value, Choice)]
    chosen = max((choice.top_k or 100 for choice in choices), default=100)
    for told in record.happened.get("gates", {}).values():
        assert len(told["mean"]) == len(told["entropy"]) == len(told["active"]) >= 1
        assert len({len(mean) for mean in told["mean"]}) == 1  # the same experts everywhere, or no figure shows them
        for mean, entropy, active in zip(*(told[key] for key in ("mean", "entropy", "active")), strict=True):
            assert 0.0 < sum(mean) < 1.0 + 1e-5
            assert 0.0 <= entropy <= math.log(len(mean)) + 1e-5
            assert 1.0 <= active <= min(len(mean), chosen) + 1e-9
            assert len(record.happened["branches"]) in (0, len(mean))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_runs_under_bf16(world: World, name: str) -> None:
    model = built(world, name)
    with torch.autocast("cpu", torch.bfloat16):
        low = logits(model).float()
    assert (low - logits(model)).abs().max() < 0.15 * logits(model).abs().max()


@pytest.mark.parametrize("name", ALL)
def test_trainable_parameters_follow_the_closed_form(world: World, name: str) -> None:
    run = run_of(world, name)
    cost = run.method.cost(run)
    if cost is None:
        pytest.skip("the method has no closed form with these settings")
    model = built(world, name)
    assert cost.trainable == sum(parameter.numel() for parameter in list_trainable(model).values())
    assert cost.total == sum(parameter.numel() for parameter in model.parameters())


def test_zero_steps_of_fine_tuning_are_the_backbone(world: World) -> None:
    bare = execute(run_of(world, "backbone"))
    still = execute(run_of(world, "sft", "train.steps=0"))
    assert still.happened["scores"] == bare.happened["scores"]


@pytest.mark.slow
def test_fine_tuning_overfits_a_single_document(world: World) -> None:
    model = built(world, "sft").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = compute_next_token_loss(compute_hidden_states(model, IDS[:, :-1]), find_head(model), IDS[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (logits(model)[:, :-1].argmax(-1)[:, 1:] == IDS[:, 2:]).float().mean() == 1.0


def test_equal_tokens_divides_the_steps_over_the_stages(world: World) -> None:
    run = run_of(world, "mode-2x-data", "train.steps=8")
    needs = run.method.needs(run)
    assert [stage.train.steps for stage in needs] == [2, 2]
    assert run.method.steps(run) == 4
    # The stages are ordinary stage-1 runs, found by anyone who asks for the same.
    stage = run_of(world, "mode-1x-uninit", "train.steps=2", "targets=[py]")
    assert prepare_run(needs[0]).id == prepare_run(stage).id


def test_every_lora_adapter_keeps_the_backbone_weights(world: World) -> None:
    model = built(world, "lora")
    bare = load_model(run_of(world, "lora").backbone)
    kept = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    renamed = {name.replace(".base_layer.", "."): value for name, value in kept.items()}
    bare.load_state_dict(renamed)
    assert fingerprint_model(bare) == fingerprint_model(load_model(run_of(world, "lora").backbone))


@pytest.mark.slow
@pytest.mark.parametrize("init", ["copy", pytest.param("random", marks=pytest.mark.slow)])
def test_experts_that_begin_alike_grow_apart(world: World, init: str) -> None:
    more = (f"method.init={init}", "method.num_blocks=6", "train.steps=3")
    run = run_of(world, "mode-2x-uninit", *more)
    execute(run, weights=True)
    before = logits(run.method.build(run, Material(backbone=lambda: load_model(run.backbone))))
    same = (before - logits(load_model(run.backbone))).abs().max() < 1e-5
    assert same == (init == "copy")  # whatever the gates say of equal branches
    for block in find_blocks(restore(prepare_run(run))):
        first, second = (torch.cat([value.flatten() for value in one.parameters()]) for one in block.experts)
        assert (first - second).abs().max() > 1e-4
