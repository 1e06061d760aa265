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
from mode.core.tensors import list_trainable
from mode.methods.anchored import Adaptation
from mode.methods.base import Material
from mode.ops.quantize import quantize_frozen
from mode.train.cuda_graph import capture_step
from mode.train.loop import forward_backward
from mode.train.objective import AnchorTerm, Objective
from mode.train.optimizer import make_optimizer
from mode.train.step_batch import StepBatch
from mode.train.step_options import StepOptions

if TYPE_CHECKING:
    from torch import nn

    from mode.config.run import Run
    from mode.methods.mode import MoDE

FULL, LORA, ONE, TWO = "full fine-tuning", "LoRA", "MoDE, one expert", "MoDE, two experts"


FOUR = "MoDE, four experts"


HALF = f"{ONE} of half a block"


ANCHORED = (FULL, LORA, TWO)
"""Methods that are also measured with an anchor."""


PLAIN = {
    "precision": "fp32",
    "memory.activation_checkpointing": "none",
    "kernels.compile": False,
    "kernels.branch_execution": "loop",
    "kernels.cuda_graph": False,
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
        changed = replace_settings(
            run, train=replace_settings(run.train, **{"memory.activation_checkpointing": "frozen"})
        )
        cases.append(Step(changed, methods[HALF], Anchor(), device).case("step", f"{HALF}, frozen layers formed again"))
    cases += [
        step.case("frozen weights, MoDE, one expert", name)
        for name, step in compare_gradients(run, methods[ONE], device)
    ]
    for name in ANCHORED:
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
    """Makes the same optimizer step of a model at every call.

    Attributes:
        bytes: Bytes of the trainable weights.
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
            anchor: Source, share and weight of the anchored rows.
            device: Device to train on.
            change: Changes the model after its optimizer is made.
        """
        load = partial(load_model, run.backbone)
        asked = replace_settings(run, method=method)
        self.model = method.build(asked, Material(backbone=load)).train()
        quantize_frozen(self.model, run.train.memory.frozen_weights)
        self.model = self.model.to(device)
        size, length = run.train.batch.size, run.train.sequence_length
        vocabulary = self.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        rows = torch.randint(vocabulary, (size, length + 1)).to(device)
        self.batch, self.settings, self.device = StepBatch(rows), run.train, device
        term = None
        if anchor.source != "none":
            anchored = torch.arange(size) >= size - max(1, round(size * anchor.share))
            self.batch = StepBatch(rows, anchored)
            term = AnchorTerm(anchor.weight, lambda step: anchored.numpy(), method.reference(load, device))
        self.objective = Objective(self.model, run.train, term)
        self.optimizer = make_optimizer(self.model, 1e-6, {}, run.train)
        self.precision = self.objective.precision
        self.options = StepOptions(self.model, run.train, half=self.precision == "bf16")
        trained = list(list_trainable(self.model).values())
        self.run_step = capture_step(forward_backward, trained, run.train, anchored=term is not None)
        self.bytes = sum(parameter.nbytes for parameter in trained)
        change(self.model)
        cost = method.cost(asked)
        self.flops = size * length * cost.flops.total if cost and not term else 0.0

    def __call__(self) -> None:
        """Make a step as the loop does."""
        with self.options:
            self.run_step(self.objective, self.batch, self.settings.batch.gradient_accumulation_steps)
        torch.nn.utils.clip_grad_norm_(self.find_optimized(), self.settings.optim.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def find_optimized(self) -> list[torch.Tensor]:
        """Return the weights that the optimizer updates."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def resident(self) -> int:
        """Return the bytes of the model's weights, of their bf16 copies and of the optimizer state."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        copies = (half for _, _, half in self.options.bf16_weights)
        return sum(part.nbytes for part in (*self.model.parameters(), *self.model.buffers(), *copies, *states))

    def case(self, job: str, variant: str) -> Case:
        """Return a case that times the step."""
        return Case(
            job,
            variant,
            self,
            tokens=self.settings.batch.size * self.settings.sequence_length,
            flops=self.flops,
            precision=self.precision,
            resident=self.resident,
            counted=not self.settings.kernels.cuda_graph,  # a graph keeps memory of its own
        )
