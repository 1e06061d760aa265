"""Ways to execute the branches of a block and a training step: each gives what the plain way gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mode.backbone.load import load_model
from mode.backbone.structure import find_decoder_layers
from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.config.run import Run
from mode.core.tensors import list_trainable
from mode.methods.base import Material
from mode.modular.build import insert_blocks
from mode.ops.attention import find_unmasked_configs
from mode.runs.execute import execute
from mode.train.cuda_graph import capture_step
from mode.train.loop import TrainJob, forward_backward, train
from mode.train.objective import Objective
from mode.train.step_batch import StepBatch
from mode.train.step_options import UNMASKED, StepOptions
from tests.conftest import World
from tests.support.families import FAMILIES, make_model
from tests.support.refusals import refused

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
ON_CUDA = ["streams", "graph", "graph, batched"]
EVERY = ["batched", *(pytest.param(way, marks=needs_cuda) for way in ON_CUDA)]
SOME = [pytest.param(name, marks=() if name in ("llama", "gemma2") else pytest.mark.slow) for name in FAMILIES]
"""Every family; those of the quick round stand for the others."""
FRESH = ["method=mode", "method.start=fresh"]


def changes_of(way: str) -> dict[str, Any]:
    """Return the settings of a way."""
    names = way.split(", ")
    execution = next((name for name in names if name != "graph"), "loop")
    return {"kernels.cuda_graph": "graph" in names, "kernels.branch_execution": execution}


def build(run: Run, device: torch.device = DEVICE) -> nn.Module:
    """Build a run's model with experts and gates that differ."""
    torch.manual_seed(0)
    model = run.method.build(run, Material(backbone=lambda: load_model(run.backbone)))
    for name, parameter in list_trainable(model).items():
        if ".gate." in name or ".experts." in name:
            nn.init.normal_(parameter, std=0.1)
    return model.to(device)


def run_step(run: Run, model: nn.Module, times: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Run forward and backward of a step, and return loss and gradients of the last time."""
    model.train()
    device = next(model.parameters()).device
    learns = list_trainable(model)
    captured = capture_step(forward_backward, list(learns.values()), run.train, anchored=False)
    objective = Objective(model, run.train, None)
    layers = StepOptions(model, run.train, half=objective.precision == "bf16")
    for number in range(times):
        torch.manual_seed(number)
        rows = torch.randint(64, (4, run.train.sequence_length + 1)).to(device)
        model.zero_grad(set_to_none=True)
        with layers:
            loss, _ = captured(objective, StepBatch(rows), 2)
    return loss.clone(), {name: value.grad.clone() for name, value in learns.items() if value.grad is not None}


def check_slopes(found: dict[str, Tensor], expected: dict[str, Tensor], near: float) -> None:
    """See that gradients are near those expected; tiny ones, which are all rounding, as near as the whole is."""
    assert found.keys() == expected.keys()
    whole = torch.stack([slope.norm() for slope in expected.values()]).norm()
    for name, slope in expected.items():
        assert (found[name] - slope).norm() <= near * (slope.norm() + 0.1 * whole), name


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", EVERY)
def test_every_way_gives_the_loss_and_the_gradients_of_the_plain_one(world: World, way: str, precision: str) -> None:
    asked = [*world.overrides, *FRESH, "method.num_experts=3", f"train.precision={precision}"]
    run = compose(asked, world.conf)
    model = build(run)
    loss, slopes = run_step(run, model, 4)
    other, others = run_step(replace_settings(run, train=replace_settings(run.train, **changes_of(way))), model, 4)
    near = {"rtol": 1e-5, "atol": 1e-6} if precision == "fp32" else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(other, loss, **near)
    check_slopes(others, slopes, 1e-4 if precision == "fp32" else 3e-2)


@pytest.mark.parametrize("family", SOME)
def test_experts_of_every_family_can_be_batched_or_say_that_they_cannot(world: World, family: str) -> None:
    run = compose([*world.overrides, *FRESH], world.conf)
    model = make_model(family)
    model.mode_blocks = insert_blocks(model, num_experts=2, num_blocks=2, expert_layers=2)
    for name, parameter in list_trainable(model).items():
        if "gate" not in name:
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.to(DEVICE)
    loss, slopes = run_step(run, model)
    batched = replace_settings(run, train=replace_settings(run.train, **{"kernels.branch_execution": "batched"}))
    if "sliding_window" in FAMILIES[family]:
        with refused("train.kernels.branch_execution=batched", "loop"):
            run_step(batched, model)
        return
    other, others = run_step(batched, model)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    check_slopes(others, slopes, 1e-4)


@pytest.mark.slow
def test_batched_experts_take_fewer_products(world: World) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func.overloadpacket.__name__ in ("mm", "bmm", "addmm")
            return func(*args, **(kwargs or {}))

    run = compose([*world.overrides, *FRESH, "method.num_experts=4"], world.conf)
    model, found = build(run), {}
    for way in ("loop", "batched"):
        with Count() as count:
            run_step(
                replace_settings(run, train=replace_settings(run.train, **{"kernels.branch_execution": way})), model
            )
        found[way] = count.calls
    assert found["batched"] < 0.6 * found["loop"]


def test_attention_is_unmasked_within_a_step_alone(world: World) -> None:
    run = compose([*world.overrides, *FRESH], world.conf)
    model = build(run, torch.device("cpu"))
    seen = []
    (layer, *_), configs = find_decoder_layers(model), find_unmasked_configs(model, 32)

    def look(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        seen.append(({each._attn_implementation for each in configs}, options["attention_mask"]))

    layer.register_forward_pre_hook(look, with_kwargs=True)
    run_step(run, model)
    assert seen == [({UNMASKED}, None)] * 2
    assert {each._attn_implementation for each in configs} == {"sdpa"}


@pytest.mark.parametrize(
    "setting",
    [
        "train.kernels.cuda_graph=true",
        "train.kernels.branch_execution=streams",
    ],
)
@pytest.mark.skipif(CUDA, reason="there is one")
def test_what_needs_a_gpu_says_so(world: World, setting: str) -> None:
    with refused(setting, "CUDA"):
        execute(compose([*world.overrides, *FRESH, setting], world.conf))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            ["train.kernels.branch_execution=batched", "train.kernels.compile=true"],
            ("branch_execution=batched", "compile"),
        ),
        (
            ["train.kernels.branch_execution=batched", "train.memory.activation_checkpointing=all"],
            ("branch_execution=batched", "activation_checkpointing"),
        ),
        (
            ["train.kernels.cuda_graph=true", "train.memory.activation_checkpointing=frozen"],
            ("graph", "activation_checkpointing"),
        ),
        (
            ["train.kernels.cuda_graph=true", "train.kernels.branch_execution=streams"],
            ("graph", "branch_execution=streams"),
        ),
        (["train.kernels.attention=flex"], ("attention=flex",)),
    ],
)
def test_ways_that_do_not_go_together_are_refused(world: World, settings: list[str], named: tuple[str, ...]) -> None:
    with refused(*named):
        compose([*world.overrides, *FRESH, *settings], world.conf)


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [["method=sft"], ["method=lora"], [*FRESH, "method.num_experts=2"]])
def test_a_run_of_a_graph_has_the_curve_of_a_plain_one(world: World, method: list[str], precision: str) -> None:
    losses = []
    for place, graph in (("plain", "false"), ("graph", "true")):
        here = world.at(world.root / place)
        asked = [
            *here.overrides,
            *method,
            "train.log_every=1",
            f"train.precision={precision}",
            f"train.kernels.cuda_graph={graph}",
        ]
        record = execute(compose([*asked, "train.steps=8", "train.device=cuda"], world.conf))
        assert record is not None
        losses.append([point["loss"] for point in record.happened["curve"]])
    plain, replayed = losses
    assert len(plain) >= 8
    assert replayed == pytest.approx(plain, rel=1e-5 if precision == "fp32" else 2e-3)


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [["method=sft"], ["method=lora"], [*FRESH, "method.num_experts=2"]])
def test_steps_of_these_methods_do_not_wait_for_a_gpu(world: World, method: list[str], precision: str) -> None:
    class Watched:
        """Rows of steps between which, but for the first ones, nothing may wait for the device."""

        def batch(self, step: int) -> Any:
            torch.cuda.set_sync_debug_mode("error" if 3 <= step < 6 else "default")
            if step == 3:
                with pytest.raises(RuntimeError, match="synchronizing"):
                    float(torch.ones(1, device=DEVICE))
            return torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(step)).numpy()

    asked = [f"train.{name}" for name in ("log_every=8", "checkpoint_every=8", "validate_every=0")]
    run = compose([*world.overrides, *method, *asked, f"train.precision={precision}"], world.conf)
    job = TrainJob(settings=run.train, steps=8, lr=1e-3, folder=world.root / "run", validate=dict)
    try:
        done = train(build(run), Watched(), job)  # type: ignore[arg-type]  # all that the loop asks of batches
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert done.curve[-1]["loss"] > 0


@needs_cuda
@pytest.mark.parametrize("method", [["method=sft"], ["method=lora"], [*FRESH, "method.num_experts=2"]])
def test_a_gpu_trains_as_a_processor_does(world: World, method: list[str]) -> None:
    found = []
    for device in ("cpu", "cuda"):
        run = compose([*world.overrides, *method, "train.precision=fp32"], world.conf)
        found.append(run_step(run, build(run, torch.device(device))))
    (loss, slopes), (other, others) = found
    assert float(other) == pytest.approx(float(loss), rel=1e-4)
    check_slopes({name: slope.cpu() for name, slope in others.items()}, slopes, 1e-3)


@pytest.mark.parametrize("family", SOME)
def test_documents_apart_have_the_loss_of_documents_alone(world: World, family: str) -> None:
    run = compose([*world.overrides, "method=sft", "train.batch.intra_document_masking=true"], world.conf)
    model, end = make_model(family), 9
    model.mode_blocks = insert_blocks(model, num_experts=1, num_blocks=2, expert_layers=1)
    torch.manual_seed(0)
    one, two = torch.randint(10, 64, (2, 12))
    one[-1] = end
    alone = [Objective(model, run.train, None)(StepBatch(document[None])) for document in (one, two)]
    objective = Objective(model, run.train, None, document_end=end)
    with StepOptions(model, run.train):
        _, _, states = objective(StepBatch(torch.cat([one, two])[None]))
    expected = torch.cat([found[2][0] for found in alone])
    places = [*range(11), *range(12, 23)]  # what follows the token that closes a document is nobody's
    torch.testing.assert_close(states[0, places], expected, rtol=1e-4, atol=1e-5)
    _, _, other = Objective(model, run.train, None)(StepBatch(torch.cat([one, two])[None]))
    assert (other[0, places] - expected).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_flex_attention_keeps_documents_apart_as_masks_do(
    world: World, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Gradients too where there is a CUDA device, on which alone it has any."""
    monkeypatch.setattr("mode.ops.attention.FLEXIBLE", (DEVICE.type,))
    run = compose([*world.overrides, "method=sft", "train.batch.intra_document_masking=true"], world.conf)
    model, end = make_model(family), 9
    model.mode_blocks = insert_blocks(model, num_experts=1, num_blocks=2, expert_layers=1)
    model.to(DEVICE)
    torch.manual_seed(0)
    rows = torch.randint(10, 64, (2, 33)).to(DEVICE)
    rows[:, 5::9] = end
    found = []
    for attention in ("sdpa", "flex"):
        settings = replace_settings(run.train, **{"kernels.attention": attention})
        with StepOptions(model, settings), torch.set_grad_enabled(CUDA):
            loss, _, states = Objective(model, settings, None, document_end=end)(StepBatch(rows))
        found.append(
            [
                loss,
                states,
                *(torch.autograd.grad(loss, list(list_trainable(model).values())) if CUDA else ()),
            ]
        )
    for value, expected in zip(found[1], found[0], strict=True):
        assert (value - expected).norm() < 1e-4 * expected.norm()
    assert not torch.equal(found[0][1], found[1][1])


@pytest.mark.skipif(CUDA, reason="there is one")
def test_flex_attention_is_refused_where_it_does_not_train(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [*world.overrides, "method=sft", "train.batch.intra_document_masking=true", "train.kernels.attention=flex"]
    with refused("train.kernels.attention=flex", "CUDA"):
        execute(compose(asked, world.conf))
    monkeypatch.setattr("mode.ops.attention.FLEXIBLE", ("cpu",))
    run = compose(asked, world.conf)
    with refused("train.kernels.attention=flex", "gpt2", "sdpa"):
        StepOptions(make_model("gpt2"), run.train)


@pytest.mark.slow
def test_a_run_with_documents_apart_is_another_run_and_learns(world: World) -> None:
    losses = {}
    for masking in ("false", "true"):
        asked = [*world.overrides, *FRESH, "train.log_every=1", f"train.batch.intra_document_masking={masking}"]
        record = execute(compose(asked, world.conf))
        losses[record.id] = [point["loss"] for point in record.happened["curve"]]
    first, second = losses.values()
    assert first != second
    assert second[-1] < second[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [[*FRESH, "method.gate.scope=prefix"], ["method=mode-anchored", *FRESH[1:], "method.num_experts=1"]]
)
def test_documents_cannot_be_apart_where_more_than_attention_looks_back(world: World, settings: list[str]) -> None:
    with refused("train.batch.intra_document_masking=true"):
        execute(compose([*world.overrides, *settings, "train.batch.intra_document_masking=true"], world.conf))
