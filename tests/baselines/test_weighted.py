"""FLOW, STM and Rho-1: the weights are those by hand, and a step is that of plain torch, however it is divided."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from baselines.weighted import FLOW, STM, RhoOne, WeightedTuning, spread
from mode.backbone.load import load_model
from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.core import processes
from mode.core.files import WEIGHTS
from mode.core.tensors import load_tensors
from mode.methods.base import Weighing
from mode.ops.loss import compute_next_token_loss
from mode.ops.weighted_loss import compute_weighted_loss
from mode.runs.execute import execute
from mode.runs.fit import make_batches, make_token_weights
from mode.runs.forecast import count_step_flops, forecast
from mode.runs.prepare import Prepared, prepare_run
from mode.train.loop import forward_backward
from mode.train.objective import Objective
from mode.train.step_batch import StepBatch
from tests.conftest import World
from tests.support.refusals import refused

NAMES = ("flow", "stm", "rho-1")
PLAIN = {"stm": ("method.tau=1e30",), "rho-1": ("method.share=1",)}
"""Settings with which all tokens count alike."""
REFERENCE = {"_target_": "baselines.sft.SFT", "lr": 1e-3}


class CrashError(Exception):
    """Stands for whatever may stop a process."""


@pytest.fixture(scope="module")
def world(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return one world for all of these tests, so that the reference model is trained once."""
    return shared_world.at(tmp_path_factory.mktemp("weighted"))


def run_of(world: World, *overrides: str) -> Any:
    return compose([*world.overrides, *overrides], world.conf)


def weigh(method: WeightedTuning, losses: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """Return a method's weights, by step, for the losses of every step under the backbone, (steps, B, S)."""
    rows = torch.zeros(*losses.shape[1:], dtype=torch.long)
    rows = torch.cat([rows, rows[:, :1]], dim=1)
    weighing: Any = Weighing(
        model=torch.nn.Identity(),
        steps=len(losses),
        rows=lambda step: torch.full_like(rows, step),
        score=lambda model, rows: losses[int(rows[0, 0])],
        backbone=torch.nn.Identity,  # type: ignore[arg-type]
        needs=tuple,
    )
    weights: Any = method.weigh(weighing)
    return lambda step: weights(step, torch.full_like(rows, step))


def prepared_weights(world: World, name: str, *overrides: str) -> tuple[Any, Any, Any, Any, Any]:
    """Return a run, a model that is not its backbone, the weights and rows by step, and the reference's state."""
    run = run_of(world, f"method={name}", "train.batch.size=4", *overrides)
    prepared = prepare_run(run)
    model = load_model(run.backbone).requires_grad_(True).train()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    state = None
    for stage in prepared.method.needs(run):
        execute(stage, weights=True)
        state = load_tensors(prepare_run(stage).folder / WEIGHTS)[0]
    batches = make_batches(prepared, torch.device("cpu"))
    weights = make_token_weights(prepared, model, batches, prepared.method.steps(run))
    return run, model, weights, lambda step: torch.from_numpy(batches.batch(step)), state


@torch.no_grad()
def losses_by_hand(model: Any, rows: torch.Tensor) -> torch.Tensor:
    logits = model.eval()(input_ids=rows[:, :-1]).logits
    return functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")


def weights_by_hand(name: str, run: Any, model: Any, rows: Any, state: Any) -> torch.Tensor:
    """Return the weights of the first step, computed by other code than the methods'."""
    frozen = load_model(run.backbone)
    first = losses_by_hand(frozen, rows(0))
    if name == "flow":
        losses = [losses_by_hand(frozen, rows(step)).mean(1).tolist() for step in range(run.train.steps)]
        tau = float(np.median(losses))
        every = [[math.exp(-loss / tau) for loss in step] for step in losses]
        mean = float(np.mean(every))
        return torch.tensor(every[0])[:, None].expand_as(first) / mean
    if name == "stm":
        chosen = first.exp() <= run.method.tau
    else:
        frozen.load_state_dict(state, strict=False)
        excess = losses_by_hand(model, rows(0)) - losses_by_hand(frozen, rows(0))
        last = excess.flatten().sort(descending=True).values[round(0.6 * excess.numel()) - 1]
        chosen = excess >= last
    return chosen / chosen.float().mean()


# --- the weights


def test_a_row_weighs_less_the_worse_the_backbone_predicts_it() -> None:
    means = torch.tensor([[0.5, 3.0], [1.0, 2.0], [4.0, 0.25]])
    noise = torch.tensor([-0.1, 0.0, 0.1])
    weights = weigh(FLOW(lr=1e-3), means[..., None] + noise)
    found = torch.stack([weights(step) for step in range(3)])
    assert found.shape == (3, 2, 3)
    assert torch.equal(found.amin(-1), found.amax(-1))
    assert found.mean().item() == pytest.approx(1)
    rows = found[..., 0].flatten()
    assert torch.equal(rows.argsort(descending=True), means.flatten().argsort())
    tau = 1.5  # the median
    torch.testing.assert_close(rows / rows[0], torch.exp((means.flatten()[0] - means.flatten()) / tau))


def test_equal_losses_are_equal_weights() -> None:
    assert torch.equal(weigh(FLOW(lr=1e-3), torch.full((3, 2, 5), 1.7))(1), torch.ones(2, 5))


def test_tokens_of_a_large_perplexity_do_not_train() -> None:
    perplexities = torch.tensor([[[1.0, 2.4, 2.6], [9.0, 2.4, 1.5]]])
    weights = weigh(STM(lr=1e-3, tau=2.5), perplexities.log())(0)
    assert weights.tolist() == [[1.5, 1.5, 0.0], [0.0, 1.5, 1.5]]
    assert torch.equal(weigh(STM(lr=1e-3, tau=1e30), perplexities.log())(0), torch.ones(2, 3))
    assert torch.equal(weigh(STM(lr=1e-3, tau=1), perplexities.log() + 1)(0), torch.zeros(2, 3))


@pytest.mark.parametrize(("share", "count"), [(0.6, 6), (1.0, 10), (0.01, 1)])
def test_the_largest_excess_losses_train(monkeypatch: pytest.MonkeyPatch, share: float, count: int) -> None:
    torch.manual_seed(0)
    own, other = torch.rand(2, 5), torch.rand(2, 5)
    reference = torch.nn.Linear(1, 1)
    monkeypatch.setattr(RhoOne, "load_reference", lambda self, weighing: reference)
    weighing: Any = Weighing(
        model=torch.nn.Identity(),
        steps=1,
        rows=lambda step: torch.zeros(2, 6),
        score=lambda model, rows: other if model is reference else own,
        backbone=None,  # type: ignore[arg-type]
        needs=tuple,
    )
    weights = RhoOne(lr=1e-3, share=share, reference=REFERENCE).weigh(weighing)(0, torch.zeros(2, 6))
    assert (weights > 0).sum() == count
    excess = own - other
    assert excess[weights > 0].min() >= excess[weights == 0].max() if count < 10 else True
    assert weights.mean().item() == pytest.approx(1)


def test_equal_weights_have_the_mean_one_unless_nothing_trains() -> None:
    found = spread(torch.tensor([[True, False], [True, True]]))
    torch.testing.assert_close(found, torch.tensor([[4 / 3, 0.0], [4 / 3, 4 / 3]]))
    assert not spread(torch.zeros(2, 2, dtype=torch.bool)).any()


# --- the loss


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("tokens", [7, 1030])
def test_a_weighted_loss_and_its_gradient_are_those_of_whole_logits(cap: float | None, tokens: int) -> None:
    torch.manual_seed(0)
    states, head = torch.randn(2, tokens, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets, weights = torch.randint(11, (2, tokens)), torch.rand(2, tokens)
    weights[:, ::3] = 0
    logits = states @ head.T if cap is None else cap * torch.tanh(states @ head.T / cap)
    expected = (weights * functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")).mean()
    wanted = torch.autograd.grad(expected, (states, head))
    found = compute_weighted_loss(states, head, targets, weights, cap)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(found, (states, head))
    for mine, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-8)
    assert not gradients[0][:, ::3].any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_of_one_are_the_plain_loss(precision: str) -> None:
    torch.manual_seed(0)
    states, head = torch.randn(2, 600, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(40, (2, 600))
    losses = (
        compute_next_token_loss(states, head, targets, precision=precision),
        compute_weighted_loss(states, head, targets, torch.ones(2, 600), precision=precision),
    )
    pairs = [(loss, *torch.autograd.grad(loss, (states, head))) for loss in losses]
    tolerance = {"rtol": 1e-4, "atol": 1e-7} if precision == "fp32" else {"rtol": 0.02, "atol": 1e-4}
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_plain_torch(world: World, name: str, micro_batches: int) -> None:
    overrides = ("method.tau=200",) if name == "stm" else ()
    run, model, weights, rows, state = prepared_weights(world, name, *overrides)
    wanted = weights_by_hand(name, run, model, rows, state)
    assert wanted.unique().numel() > 1
    model.train()
    found = weights(0, rows(0))
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6)
    assert model.training
    batch = StepBatch(rows(0), weights=found)
    loss, _ = forward_backward(Objective(model, run.train, None), batch, micro_batches)
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=rows(0)[:, :-1]).logits
    losses = functional.cross_entropy(logits.transpose(1, 2), rows(0)[:, 1:], reduction="none")
    expected = (wanted * losses).sum() / losses.numel()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-3, atol=1e-6)


# --- runs


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_where_all_tokens_count_alike_it_is_full_fine_tuning(world: World, name: str) -> None:
    overrides = (f"method={name}", *PLAIN[name])
    record = execute(run_of(world, *overrides))
    curve = record.happened["curve"]
    assert {point["trained_share"] for point in curve} == {1.0}
    if name == "stm":  # Rho-1 has its rows in another order than full fine-tuning
        plain = execute(run_of(world, "method=sft")).happened["curve"]
        assert [point["loss"] for point in curve] == pytest.approx([point["loss"] for point in plain], rel=1e-5)
        assert "trained_share" not in plain[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_accumulation_changes_nothing_but_rounding(world: World, name: str) -> None:
    settings = (f"method={name}", "train.batch.size=4", *(("method.tau=200",) if name == "stm" else ()))
    losses = [
        [point["loss"] for point in execute(run_of(world, *settings, *more)).happened["curve"]]
        for more in ((), ("train.batch.gradient_accumulation_steps=4",))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_ends_bit_identical(
    shared_world: World, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    settings = (f"method={name}", "train.steps=8", "train.log_every=1", "train.checkpoint_every=4")
    settings = (*settings, *(("method.tau=200",) if name == "stm" else ()))
    whole, broken = (shared_world.at(tmp_path_factory.mktemp(place)) for place in ("whole", "broken"))
    expected = execute(run_of(whole, *settings), weights=True)
    own = prepare_run(run_of(broken, *settings)).id

    def crash(prepared: Prepared, point: dict[str, Any]) -> None:
        if prepared.id == own and point["step"] == 6:
            raise CrashError

    with pytest.raises(CrashError):
        execute(run_of(broken, *settings), observe=crash)
    resumed = execute(run_of(broken, *settings), weights=True)
    curves = [
        [{key: value for key, value in point.items() if key != "seconds"} for point in record.happened["curve"]]
        for record in (expected, resumed)
    ]
    assert curves[0] == curves[1]
    left, right = (load_tensors(prepare_run(run_of(at, *settings)).folder / WEIGHTS)[0] for at in (whole, broken))
    assert all(torch.equal(left[key], right[key]) for key in left)


# --- cost and stages


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_of_frozen_models_count(world: World, name: str) -> None:
    run = run_of(world, f"method={name}")
    rows = torch.zeros(2, run.train.sequence_length, dtype=torch.long)
    frozen: Any = load_model(run.backbone).requires_grad_(False)
    counted = count_step_flops(frozen, rows, nullcontext()).forward
    passes = 2 if name == "rho-1" else 1
    assert run.method.anchoring_flops(run) == pytest.approx(passes * counted, rel=0.01)
    own, plain = (forecast(run_of(world, f"method={each}")) for each in (name, "sft"))
    assert own is not None
    assert plain is not None
    assert own.flops - plain.flops == pytest.approx(passes * counted * own.tokens, rel=0.01)


@pytest.mark.parametrize("name", ["flow", "stm"])
def test_equal_operations_are_fewer_steps(world: World, name: str) -> None:
    run = run_of(world, f"method={name}", "train.steps=80", "budget=compute")
    assert 58 <= run.method.steps(run) <= 62  # about four forward passes instead of three


@pytest.mark.parametrize(("budget", "steps"), [("paper", (9, 9)), ("data", (4, 5)), ("params", (4, 5))])
def test_the_reference_model_takes_its_share_of_the_tokens(world: World, budget: str, steps: tuple[int, int]) -> None:
    run = run_of(world, "method=rho-1", "train.steps=9", f"budget={budget}")
    (stage,) = run.method.needs(run)
    assert (stage.method.steps(stage), run.method.steps(run)) == steps
    ordinary = run_of(world, "method=sft", f"train.steps={steps[0]}")
    assert prepare_run(stage).id == prepare_run(ordinary).id
    assert run.method.order(run) != stage.method.order(stage)


def test_equal_operations_are_those_of_both_stages(world: World) -> None:
    run = run_of(world, "method=rho-1", "train.steps=90", "budget=compute")
    whole, told = forecast(run_of(world, "method=sft", "train.steps=90")), [forecast(run)]
    told += [forecast(stage) for stage in run.method.needs(run)]
    assert whole is not None
    assert sum(each.flops for each in told if each) == pytest.approx(whole.flops, rel=0.02)


# --- refusals


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("method=stm", "method.tau=-1"), ("method.tau",)),
        (("method=stm", "method.tau=0.5"), ("method.tau",)),
        (("method=rho-1", "method.share=0"), ("method.share",)),
        (("method=rho-1", "method.share=1.5"), ("method.share",)),
        (("method=flow", "method.tau=2"), ("method.tau",)),
    ],
)
def test_wrong_settings_are_refused(world: World, overrides: tuple[str, ...], named: tuple[str, ...]) -> None:
    with refused(*named):
        run_of(world, *overrides)


@pytest.mark.parametrize("setting", ["train.kernels.cuda_graph", "train.batch.intra_document_masking"])
def test_what_does_not_go_with_weights_is_refused(world: World, setting: str) -> None:
    with refused(setting):
        execute(run_of(world, "method=stm", f"{setting}=true"))


def test_several_processes_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from mode.config.train import Train
    from mode.train.token_weights import check_weighing

    monkeypatch.setattr(processes, "world_size", lambda: 2)
    check_weighing(Train(), None)
    with refused("one process", "--nproc"):
        check_weighing(Train(), lambda step, rows: rows)


def test_a_reference_that_does_not_train_all_weights_is_refused(world: World) -> None:
    run = run_of(world, "method=rho-1")
    lora = {"_target_": "baselines.lora.LoRA", "lr": 1e-3, "rank": 2, "alpha": 2, "target_modules": "attention"}
    with refused("method.reference._target_=baselines.lora.LoRA"):
        execute(replace_settings(run, method=replace_settings(run.method, reference=lora)))
