"""Frozen matrices in eight bits: near what they were, gradients through them, and nothing else of a run changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from mode.backbone.load import load_model
from mode.backbone.structure import find_decoder_layers, find_frozen_matrices
from mode.bench.run import run_suite
from mode.config.compose import compose
from mode.methods.base import Material
from mode.ops.loss import compute_hidden_states
from mode.ops.quantize import KINDS, QuantizedLinear, dequantize, quantize_frozen
from mode.runs.execute import execute
from mode.train.loop import Trained, TrainJob, train
from mode.train.step_options import StepOptions
from tests.conftest import World
from tests.support.families import FAMILIES, make_model
from tests.support.refusals import refused
from tests.train.test_loop import curve_of, run_of

FRESH = ("method=mode", "method.start=fresh", "method.num_experts=1")


@pytest.mark.parametrize(("choice", "most"), [("int8", 0.5 / 127), ("fp8", 2.0**-4)])
def test_numbers_are_the_nearest_that_a_row_has(choice: str, most: float) -> None:
    torch.manual_seed(0)
    base = nn.Linear(64, 48)
    with torch.no_grad():
        base.weight[7] *= 100  # a row's scale is its own
        base.weight[9] = 0
    made = QuantizedLinear(base, KINDS[choice])
    values = made.values if choice == "int8" else made.values.view(torch.float8_e4m3fn)
    back = dequantize(values, made.scale, torch.float32)
    largest = base.weight.abs().amax(dim=1, keepdim=True)
    # Steps of int8 are even; fp8 has three bits after the first, of each number or of the smallest that is normal.
    bound = most * (largest if choice == "int8" else torch.maximum(base.weight.abs(), largest * 2.0**-6 / 448))
    assert bool(((back - base.weight).abs() <= bound + 1e-9).all())
    assert made.values.element_size() == 1
    x = torch.randn(5, 64)
    torch.testing.assert_close(made(x), functional.linear(x, back, base.bias))


@pytest.mark.parametrize("choice", ["int8", "fp8"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_pass_and_nothing_in_full_is_kept_for_them(choice: str, autocast: bool) -> None:
    torch.manual_seed(0)
    made = QuantizedLinear(nn.Linear(64, 48, bias=False).requires_grad_(False), KINDS[choice])
    x = torch.randn(5, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each),  # type: ignore[func-returns-value]
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = made(x)
    assert out.dtype is (torch.bfloat16 if autocast else torch.float32)
    assert {each.element_size() for each in kept if each.shape == made.values.shape} == {1}
    out.float().square().sum().backward()
    values = made.values if choice == "int8" else made.values.view(torch.float8_e4m3fn)
    back = dequantize(values, made.scale, torch.float32)
    expected = 2 * functional.linear(x.detach(), back) @ back
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=1e-2 if autocast else 1e-5, atol=2e-2 if autocast else 1e-5)


def test_frozen_matrices_alone_are_quantized_each_once_and_take_a_quarter(world: World) -> None:
    run: Any = compose([*world.overrides, *FRESH], world.conf)

    model = run.method.build(run, Material(backbone=lambda: load_model(run.backbone)))
    learning = {id(each) for each in model.parameters() if each.requires_grad}
    matrices = find_frozen_matrices(find_decoder_layers(model))
    before, gone = sum(each.nbytes for each in matrices), {id(each) for each in matrices}
    assert len(matrices) == 6 * 7
    quantize_frozen(model, "int8")
    assert {id(each) for each in model.parameters() if each.requires_grad} == learning
    assert not gone & {id(each) for each in model.parameters()}
    held = {module for module in model.modules() if isinstance(module, QuantizedLinear)}
    assert len(held) == len(matrices)
    assert sum(each.values.nbytes + each.scale.nbytes for each in held) < 0.5 * before  # rows of 16 numbers
    assert not StepOptions(model, run.train, half=True).bf16_weights


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_matrices_that_are_quantized(family: str) -> None:
    model, plain = (make_model(family).eval().requires_grad_(False) for _ in range(2))
    layer = find_decoder_layers(model)[0]
    matrices = [each for each in layer.parameters() if each.ndim == 2]
    quantize_frozen(model, "int8")
    assert sum(isinstance(each, QuantizedLinear) for each in layer.modules()) == len(matrices)
    ids = torch.arange(2, 18)[None]
    found, expected = (each(input_ids=ids).logits for each in (model, plain))
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["int8", "fp8"])
def test_the_backbone_alone_is_scored_in_eight_bits(world: World, choice: str) -> None:
    full, eight = (
        execute(run_of(world, "method=backbone", *more)).happened["scores"]["sums"]
        for more in ((), (f"train.memory.frozen_weights={choice}",))
    )
    assert eight["loss"] != full["loss"]
    assert eight["loss"] == pytest.approx(full["loss"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "mode"])
def test_the_anchors_reference_is_the_backbone_in_eight_bits(world: World, method: str) -> None:
    anchor = [
        "method.anchor.source=prose",
        "method.anchor.share=0.5",
        "train.memory.frozen_weights=fp8",
        "train.steps=1",
    ]
    asked = [*(FRESH if method == "mode" else [f"method={method}"]), *anchor, "train.lr=1e-9", "train.log_every=1"]
    seen: list[Any] = []

    def train_and_keep(model: Any, batches: Any, job: TrainJob) -> Trained:
        seen.append((model, job.anchor))
        return train(model, batches, job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mode.train.loop.train", train_and_keep)
        execute(run_of(world, *asked))
    ((model, term),) = seen
    rows = torch.arange(2, 18)[None]
    states, _ = term.reference(model, rows)
    plain = load_model(run_of(world).backbone).eval().requires_grad_(False)
    quantize_frozen(plain, "fp8")
    torch.testing.assert_close(states, compute_hidden_states(plain, rows))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "mixlora", "mode"])
@pytest.mark.parametrize("choice", ["int8", "fp8"])
def test_a_run_in_eight_bits_is_near_the_one_in_full(world: World, method: str, choice: str) -> None:
    half = ["train.precision=bf16"] if method == "lora" else []
    asked = [*(FRESH if method == "mode" else [f"method={method}"]), *half, "train.log_every=1"]
    full, eight = (execute(run_of(world, *asked, *more)) for more in ((), (f"train.memory.frozen_weights={choice}",)))
    assert full.id != eight.id
    assert eight.asked["train"]["frozen_weights"] == choice
    assert "frozen_weights" not in full.asked["train"]
    losses, plain = ([point["loss"] for point in curve_of(record)] for record in (eight, full))
    assert losses != plain
    assert losses == pytest.approx(plain, rel=1e-2)
    assert eight.happened["parameters"] == full.happened["parameters"]
    assert eight.happened["flops"] == full.happened["flops"]


@pytest.mark.slow
def test_a_run_in_eight_bits_goes_on_where_it_stopped_and_is_scored_again_as_it_was(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    from cli.eval import rescore

    asked = (*FRESH, "train.memory.frozen_weights=int8", "train.log_every=1", "train.checkpoint_every=2")

    def stop(prepared: Any, point: Any) -> None:
        if point["step"] == 3:
            raise KeyboardInterrupt

    run = run_of(world, *asked)
    with pytest.raises(KeyboardInterrupt):
        execute(run, observe=stop)
    record = execute(run)
    other = world.at(world.root / "other")
    assert curve_of(record) == curve_of(execute(run_of(other, *asked)))
    rescore(run)
    assert "accuracies equal the record's" in capsys.readouterr().out


def test_what_has_nothing_frozen_is_told(world: World) -> None:
    with refused("train.memory.frozen_weights=int8", "frozen"):
        execute(run_of(world, "method=sft", "train.memory.frozen_weights=int8"))


def test_a_benchmark_is_not_asked_for_eight_bits(world: World) -> None:
    with refused("train.memory.frozen_weights", "int8"):
        run_suite("scale", run_of(world, *FRESH, "train.memory.frozen_weights=int8"), 1)


@pytest.mark.parametrize("setting", ["train.parallelism.strategy=fsdp", "train.kernels.branch_execution=batched"])
def test_what_eight_bits_do_not_go_with_is_refused(world: World, setting: str) -> None:
    with refused("frozen_weights=fp8", setting.removeprefix("train.")):
        run_of(world, *FRESH, "train.memory.frozen_weights=fp8", setting)
