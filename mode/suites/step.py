"""The suites `step`, `options`, `branches` and `scale`: an optimizer step by method, by the loop's options, by size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mode import config
from mode.backbone import load_model, stack
from mode.checkpoint import Saver
from mode.cost import layers_per_block, shape_of
from mode.files import checkpoint_of
from mode.graph import WARM_UP, recorded
from mode.layers import Layers
from mode.loss import hidden_states
from mode.method import Adaptation, Material
from mode.modular import blocks_of
from mode.objective import Hold, Objective
from mode.quantized import quantize_frozen
from mode.settings import SELF, Anchor
from mode.suites.peers import known, peers
from mode.tensors import trainable
from mode.timing import Case
from mode.train import Job, accumulate, make_optimizer

if TYPE_CHECKING:
    from torch import nn

    from mode.modular_method import MoDE
    from mode.settings import Run

FULL, LORA, ONE, TWO = "full fine-tuning", "LoRA", "MoDE, one expert", "MoDE, two experts"
FOUR = "MoDE, four experts"
HALF = f"{ONE} of half a block"
HELD = (FULL, LORA, TWO)
"""Methods whose anchor is measured."""
OPTIONAL = (FULL, LORA, ONE)
"""Methods that are measured under the loop's options."""
PLAIN = {
    "precision": "fp32",
    "activation_checkpointing": "none",
    "compile": False,
    "branches": "loop",
    "graph": False,
}
"""The loop's options where none of them is measured."""
STAY = "two branches of every token stay"


def steps(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return what to time, and the bytes of every method's weights that train.

    Experts are fresh and rows are random: neither changes what a step takes.

    Args:
        run: Names backbone, rows and their length.
        method: Shape of blocks, experts and gates.
        device: Where the models train.
        folder: For what other trainers write.
    """
    methods = chosen(run, method)
    plain = {name: Step(run, each, Anchor(), device) for name, each in methods.items()}
    cases = [step.case("step", name) for name, step in plain.items()]
    if HALF in methods:
        again = config.replace_settings(
            run, train=config.replace_settings(run.train, activation_checkpointing="frozen")
        )
        cases.append(Step(again, methods[HALF], Anchor(), device).case("step", f"{HALF}, frozen layers formed again"))
    cases += [step.case("frozen weights, MoDE, one expert", name) for name, step in wasteful(run, methods[ONE], device)]
    for name in HELD:
        held = Step(run, methods[name], Anchor(source=SELF), device)
        cases += [plain[name].case(f"anchor, {name}", "none"), held.case(f"anchor, {name}", "held")]
    cases += peers(run, {name: methods[name] for name in (FULL, LORA)}, device, folder)
    return cases, {name: step.bytes for name, step in plain.items()}


def options(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return what to time to see what the loop's options do to a step: precision, memory for time, compiled layers.

    Args:
        run: Names backbone, rows and their length.
        method: Shape of blocks, experts and gates.
        device: Where the models train.
        folder: For a checkpoint.
    """
    variants: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"precision": "bf16"},
        "compiled layers": {"compile": True},
        "compiled layers, bf16": {"compile": True, "precision": "bf16"},
        "activations of frozen layers formed again": {"activation_checkpointing": "frozen"},
        "activations of all layers formed again": {"activation_checkpointing": "all"},
        "frozen weights in int8, bf16": {"frozen_weights": "int8", "precision": "bf16"},
        "frozen weights in fp8, bf16": {"frozen_weights": "fp8", "precision": "bf16"},
    }
    if device.type == "cuda":  # to compile takes long there, and nobody trains in fp32
        variants.pop("compiled layers")
    methods = chosen(run, method)
    cases = []
    for name in OPTIONAL:
        for variant, changes in variants.items():
            changed = config.replace_settings(run, train=config.replace_settings(run.train, **PLAIN | changes))
            if name != FULL or "frozen" not in variant:  # nothing is there
                cases.append(Step(changed, methods[name], Anchor(), device).case(f"options, {name}", variant))
    return cases, checkpoint_bytes(Step(run, methods[ONE], Anchor(), device), folder)


def branches(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return what to time of the ways that branches run, and on a GPU of steps whose passes are one CUDA graph.

    Args:
        run: Names backbone, rows and their length.
        method: Shape of blocks, experts and gates.
        device: Where the models train.
        folder: Not used.
    """
    methods, plain = chosen(run, method), PLAIN | {"precision": run.train.precision}
    ways: dict[str, dict[str, Any]] = {"in a loop": {}, "batched": {"branches": "batched"}}
    if device.type == "cuda":
        ways |= {f"{name}, one graph": {**changes, "graph": True} for name, changes in ways.items()}
        ways["on streams"] = {"branches": "streams"}
    jobs = {(f"branches, {FOUR}", FOUR): ways}
    if device.type == "cuda":
        graphs = {
            "launched": {},
            "one graph": {"graph": True},
            "one graph, compiled layers": {"graph": True, "compile": True},
        }
        jobs |= {(f"graph, {name}", name): graphs for name in OPTIONAL}
    cases = []
    for (job, name), variants in jobs.items():
        for variant, changes in variants.items():
            changed = config.replace_settings(run, train=config.replace_settings(run.train, **plain | changes))
            step = Step(changed, methods[name], Anchor(), device)
            for _ in range(WARM_UP + 1 if step.job.settings.graph else 0):  # what is timed is replayed
                step()
            cases.append(step.case(job, variant))
    return cases, {}


def checkpoint_bytes(step: Step, folder: Path) -> dict[str, int]:
    """Return the bytes of the weights that train with both moments of AdamW, and of a checkpoint of them."""
    step()
    with Saver() as saver:
        saver.save(folder, trainable(step.model), step.optimizer, 1, 0.0)
    size = sum(file.stat().st_size for file in checkpoint_of(folder, 1).iterdir())
    return {"weights that train, and their moments": 3 * step.bytes, "checkpoint": size}


def scale(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return what to time to see how a step grows: experts, their layers, blocks, rows, vocabulary.

    Where time follows the closed form of the operations, the share of the machine's rate stays the same.

    Args:
        run: Names backbone, rows and their length; longer rows are fewer, so that a step has as many tokens. With
            random weights the vocabulary is varied too.
        method: Shape of blocks, experts and gates where it is not varied.
        device: Where the models train.
        folder: Not used.
    """
    count, size, length = len(shape_of(run.backbone).layers), run.train.batch_size, run.train.sequence_length
    fresh = partial(config.replace_settings, method, start="fresh", experts=(), num_experts=1)
    two = config.replace_settings(method.gate, top_k=2)
    divisors = [number for number in range(1, count + 1) if count % number == 0]
    jobs: dict[str, dict[str, tuple[Adaptation, dict[str, int]]]] = {
        "experts": {f"N = {number}": (fresh(num_experts=number), {}) for number in (1, 2, 4, 8, 16)}
        | {f"N = {number}, {STAY}": (fresh(num_experts=number, gate=two), {}) for number in (4, 8, 16)},
        "blocks": {f"B = {number}": (fresh(num_blocks=number, expert_layers=1), {}) for number in divisors},
        "layers of an expert": {
            f"l = {number}": (fresh(expert_layers=number), {}) for number in range(1, count // method.num_blocks + 1)
        },
        "tokens of a row": {
            f"S = {length * part}": (fresh(), {"sequence_length": length * part, "batch_size": size // part})
            for part in (1, 2, 4)
            if size % part == 0
        },
    }
    if run.backbone.random is not None:
        sizes = [shape_of(run.backbone).vocabulary * part // 4 for part in (1, 2, 4, 8, 16)]
        jobs["vocabulary"] = {f"V = {number}": (fresh(), {}) for number in sizes}
    cases = []
    for job, variants in jobs.items():
        for name, (each, changes) in variants.items():
            changed = config.replace_settings(run, train=config.replace_settings(run.train, **changes))
            if job == "vocabulary":
                changed = with_vocabulary(changed, int(name.removeprefix("V = ")))
            change = even_gates if STAY in name else lambda model: None
            cases.append(Step(changed, each, Anchor(), device, change).case(job, name))
    step = Step(run, fresh(), Anchor(), device)
    shared, states = first_block(run, method, step.rows)
    cases += [step.case("what runs on the same rows can share", "MoDE, one expert")]
    cases += [
        replace(cases[-1], variant="first block of the backbone, forward", action=shared, flops=0.0, counted=False)
    ]
    return cases, {"weights of an expert": step.bytes, "states after the first block, a step": states}


def with_vocabulary(run: Run, number: int) -> Run:
    """Return a run whose backbone, of random weights, has a vocabulary of another size."""
    assert run.backbone.random is not None
    shape = {**run.backbone.random.config, "vocab_size": number}
    random = config.replace_settings(run.backbone.random, config=shape)
    changed: Run = config.replace_settings(run, backbone=config.replace_settings(run.backbone, random=random))
    return changed


def even_gates(model: nn.Module) -> None:
    """Have branches kept by as many tokens each, as their operations are counted; fresh gates choose alike for all."""
    for block in blocks_of(model):
        block.even = True


def first_block(run: Run, method: MoDE, rows: torch.Tensor) -> tuple[Callable[[], None], int]:
    """Return an action that runs the backbone's first block alone, and the bytes of what comes out of it.

    It is the one part of a step that no expert changes: all that train on the same rows could share it.
    """
    model = load_model(run.backbone).to(rows.device).eval()
    trunk, name = stack(model)
    layers = getattr(trunk, name)
    setattr(trunk, name, layers[: len(layers) // method.num_blocks])
    model.config.num_hidden_layers = len(getattr(trunk, name))

    @torch.no_grad()
    def action() -> None:
        hidden_states(model, rows[:, :-1])

    return action, 4 * rows[:, :-1].numel() * shape_of(run.backbone).hidden


def chosen(run: Run, method: MoDE) -> dict[str, Adaptation]:
    """Return the methods to measure, by name: of MoDE, experts of other depths and in other numbers too."""
    per_block = layers_per_block(len(shape_of(run.backbone).layers), method.num_blocks)
    fresh = partial(config.replace_settings, method, start="fresh", experts=())
    methods: dict[str, Adaptation] = {FULL: known("sft"), LORA: known("lora"), ONE: fresh(num_experts=1)}
    for part, name in ((2, HALF), (4, f"{ONE} of a quarter of a block")):
        if per_block >= part:
            methods[name] = fresh(num_experts=1, expert_layers=per_block // part)
    numbers = {TWO: 2, FOUR: 4, "MoDE, eight experts": 8}
    return methods | {name: fresh(num_experts=number) for name, number in numbers.items()}


def wasteful(run: Run, method: Adaptation, device: torch.device) -> list[tuple[str, Step]]:
    """Return a step of one expert as it is, and as it is where frozen weights get gradients, which nobody reads."""

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
    """A model that makes the same optimizer step whenever it is called.

    Attributes:
        bytes: Size of the weights that train.
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
            run: Names backbone, rows and their length.
            method: The method.
            anchor: The rows on which it is held to its backbone.
            device: Where it trains.
            change: Changes the model once its optimizer is made.
        """
        load = partial(load_model, run.backbone)
        asked = config.replace_settings(run, method=method)
        self.model = method.build(asked, Material(backbone=load)).train()
        quantize_frozen(self.model, run.train.frozen_weights)
        self.model = self.model.to(device)
        size, length = run.train.batch_size, run.train.sequence_length
        vocabulary = self.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        self.rows = torch.randint(vocabulary, (size, length + 1)).to(device)
        self.held = torch.arange(size) >= size - max(1, round(size * anchor.share))
        hold = None
        if anchor.source != "none":
            hold = Hold(anchor.weight, lambda step: self.held.numpy(), method.reference(load, device))
        self.job = Job(settings=run.train, steps=1, lr=1e-6, folder=Path(), validate=dict, hold=hold)
        self.objective = Objective(self.model, run.train, hold)
        self.optimizer, self.device = make_optimizer(self.model, self.job), device
        self.precision = self.objective.precision
        self.layers = Layers(self.model, run.train, half=self.precision == "bf16")
        learns = list(trainable(self.model).values())
        self.passes = recorded(accumulate, learns, run.train, held=hold is not None)
        self.bytes = sum(parameter.nbytes for parameter in trainable(self.model).values())
        change(self.model)
        cost = method.cost(asked)
        self.flops = size * length * cost.flops.total if cost and not hold else 0.0

    def __call__(self) -> None:
        """Make a step as the loop does."""
        with self.layers:
            self.passes(self.objective, self.rows, self.job.settings.accumulate, self.held if self.job.hold else None)
        torch.nn.utils.clip_grad_norm_(self.learning(), self.job.settings.clip)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def learning(self) -> list[torch.Tensor]:
        """Return the weights that the optimizer changes."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def resident(self) -> int:
        """Return the bytes of the model's weights, of their copies in bf16 and of the optimizer's states."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        copies = (half for _, _, half in self.layers.held)
        return sum(part.nbytes for part in (*self.model.parameters(), *self.model.buffers(), *copies, *states))

    def case(self, job: str, variant: str) -> Case:
        """Return what to time."""
        return Case(
            job,
            variant,
            self,
            tokens=self.job.settings.batch_size * self.job.settings.sequence_length,
            flops=self.flops,
            precision=self.precision,
            resident=self.resident,
            counted=not self.job.settings.graph,  # what a graph keeps for itself is not among what is allocated
        )
