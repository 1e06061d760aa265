"""Suite `step`: an optimizer step of every method. The class `Step` serves other suites too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mode.backbone.load import load_model
from mode.backbone.shape import divide_layers, read_shape
from mode.bench.suites.loops import list_peers
from mode.bench.suites.setup import load_method
from mode.bench.timing import Case
from mode.config.check import replace_settings
from mode.config.method import SELF, Anchor
from mode.core.tensors import trainable_parameters
from mode.methods.anchored import Adaptation
from mode.methods.base import Material
from mode.ops.quantize import quantize_frozen
from mode.train.cuda_graph import record_passes
from mode.train.loop import TrainJob, accumulate
from mode.train.objective import AnchorTerm, Objective
from mode.train.optimizer import make_optimizer
from mode.train.step_options import StepOptions

if TYPE_CHECKING:
    from torch import nn

    from mode.config.run import Run
    from mode.methods.mode import MoDE

FULL, LORA, ONE, TWO = "full fine-tuning", "LoRA", "MoDE, one expert", "MoDE, two experts"


FOUR = "MoDE, four experts"


HALF = f"{ONE} of half a block"


HELD = (FULL, LORA, TWO)
"""Methods that are also measured with an anchor."""


PLAIN = {
    "precision": "fp32",
    "activation_checkpointing": "none",
    "compile": False,
    "branches": "loop",
    "graph": False,
}
"""Default training options of the suites."""


def prepare_steps(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return cases that time a step of every method, and the bytes of the trainable weights of each method.

    Experts are fresh and rows are random. Neither changes the time of a step.

    Args:
        run: Run with the backbone, the batch size and the sequence length.
        method: Method with the shape of blocks, experts and gates.
        device: Device of the models.
        folder: Folder for files of other trainers.
    """
    methods = choose_methods(run, method)
    plain = {name: Step(run, settings, Anchor(), device) for name, settings in methods.items()}
    cases = [step.case("step", name) for name, step in plain.items()]
    if HALF in methods:
        changed = replace_settings(run, train=replace_settings(run.train, activation_checkpointing="frozen"))
        cases.append(Step(changed, methods[HALF], Anchor(), device).case("step", f"{HALF}, frozen layers formed again"))
    cases += [
        step.case("frozen weights, MoDE, one expert", name)
        for name, step in compare_gradients(run, methods[ONE], device)
    ]
    for name in HELD:
        anchored = Step(run, methods[name], Anchor(source=SELF), device)
        cases += [plain[name].case(f"anchor, {name}", "none"), anchored.case(f"anchor, {name}", "held")]
    cases += list_peers(run, {name: methods[name] for name in (FULL, LORA)}, device, folder)
    return cases, {name: step.bytes for name, step in plain.items()}


def choose_methods(run: Run, method: MoDE) -> dict[str, Adaptation]:
    """Return the methods to measure, by name, including MoDE with other depths and numbers of experts."""
    per_block = divide_layers(len(read_shape(run.backbone).layers), method.num_blocks)
    fresh = partial(replace_settings, method, start="fresh", experts=())
    methods: dict[str, Adaptation] = {FULL: load_method("sft"), LORA: load_method("lora"), ONE: fresh(num_experts=1)}
    for part, name in ((2, HALF), (4, f"{ONE} of a quarter of a block")):
        if per_block >= part:
            methods[name] = fresh(num_experts=1, expert_layers=per_block // part)
    numbers = {TWO: 2, FOUR: 4, "MoDE, eight experts": 8}
    return methods | {name: fresh(num_experts=number) for name, number in numbers.items()}


def compare_gradients(run: Run, method: Adaptation, device: torch.device) -> list[tuple[str, Step]]:
    """Return steps of one expert without and with unused gradients of frozen weights, by variant."""

    def gradients_everywhere(model: nn.Module) -> None:
        model.requires_grad_(True)

    def gradients_through_the_first_block(model: nn.Module) -> None:
        model.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]

    return [
        ("no gradients of them", Step(run, method, Anchor(), device)),
        ("gradients through the first block", Step(run, method, Anchor(), device, gradients_through_the_first_block)),
        ("gradients of all of them", Step(run, method, Anchor(), device, gradients_everywhere)),
    ]


class Step:
    """A model with an optimizer and rows. Every call makes an optimizer step on the same rows.

    Attributes:
        bytes: Size of the trainable weights in bytes.
    """

    def __init__(
        self,
        run: Run,
        method: Adaptation,
        anchor: Anchor,
        device: torch.device,
        change: Callable[[nn.Module], None] = lambda model: None,
    ) -> None:
        """Build the model, its optimizer and its rows.

        Args:
            run: Run with the backbone, the batch size and the sequence length.
            method: The method.
            anchor: The anchor to the backbone.
            device: Device of the model.
            change: Changes the model after its optimizer is made.
        """
        load = partial(load_model, run.backbone)
        asked = replace_settings(run, method=method)
        self.model = method.build(asked, Material(backbone=load)).train()
        quantize_frozen(self.model, run.train.frozen_weights)
        self.model = self.model.to(device)
        size, length = run.train.batch_size, run.train.sequence_length
        vocabulary = self.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        self.rows = torch.randint(vocabulary, (size, length + 1)).to(device)
        self.held = torch.arange(size) >= size - max(1, round(size * anchor.share))
        hold = None
        if anchor.source != "none":
            hold = AnchorTerm(anchor.weight, lambda step: self.held.numpy(), method.reference(load, device))
        self.job = TrainJob(settings=run.train, steps=1, lr=1e-6, folder=Path(), validate=dict, hold=hold)
        self.objective = Objective(self.model, run.train, hold)
        self.optimizer, self.device = (
            make_optimizer(self.model, self.job.lr, self.job.lr_scales, self.job.settings),
            device,
        )
        self.precision = self.objective.precision
        self.layers = StepOptions(self.model, run.train, half=self.precision == "bf16")
        learns = list(trainable_parameters(self.model).values())
        self.passes = record_passes(accumulate, learns, run.train, held=hold is not None)
        self.bytes = sum(parameter.nbytes for parameter in trainable_parameters(self.model).values())
        change(self.model)
        cost = method.cost(asked)
        self.flops = size * length * cost.flops.total if cost and not hold else 0.0

    def __call__(self) -> None:
        """Make an optimizer step, as the training loop does."""
        with self.layers:
            self.passes(self.objective, self.rows, self.job.settings.accumulate, self.held if self.job.hold else None)
        torch.nn.utils.clip_grad_norm_(self.list_parameters(), self.job.settings.clip)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def list_parameters(self) -> list[torch.Tensor]:
        """Return the parameters of the optimizer."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def resident(self) -> int:
        """Return the bytes of the model's weights, their copies in bf16 and the optimizer state."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        copies = (half for _, _, half in self.layers.held)
        return sum(part.nbytes for part in (*self.model.parameters(), *self.model.buffers(), *copies, *states))

    def case(self, job: str, variant: str) -> Case:
        """Return a case that times the step."""
        return Case(
            job,
            variant,
            self,
            tokens=self.job.settings.batch_size * self.job.settings.sequence_length,
            flops=self.flops,
            precision=self.precision,
            resident=self.resident,
            counted=not self.job.settings.graph,  # the memory of a CUDA graph is not part of the allocated memory
        )
