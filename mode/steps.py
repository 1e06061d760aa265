"""The suite `step`: what an optimizer step of each method takes beside full fine-tuning's, and what an anchor adds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mode import config
from mode.backbone import load_model
from mode.checkpoint import trainable
from mode.method import Adaptation, Material
from mode.settings import SELF, Anchor
from mode.timing import Case
from mode.train import Hold, Job, accumulate, make_optimizer

if TYPE_CHECKING:
    from mode.modular_method import MoDE
    from mode.settings import Run


def steps(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return what to time, and the bytes of every method's weights that train.

    Experts are fresh and rows are random: neither changes what a step takes.

    Args:
        run: Names backbone, rows and their length.
        method: Shape of blocks, experts and gates.
        device: Where the models train.
        folder: Not used; nothing is written.
    """
    one, two = (config.replace(method, start="fresh", num_experts=count, experts=()) for count in (1, 2))
    methods: dict[str, Adaptation] = {
        "full fine-tuning": known("sft"),
        "LoRA": known("lora"),
        "MoDE, one expert": one,
        "MoDE, two experts": two,
    }
    tokens = run.train.batch_size * run.train.sequence_length
    plain = {name: Step(run, each, Anchor(), device) for name, each in methods.items()}
    cases = [Case("step", name, step, tokens) for name, step in plain.items()]
    for name in ("full fine-tuning", "LoRA", "MoDE, two experts"):
        held = Step(run, methods[name], Anchor(source=SELF), device)
        cases += [Case(f"anchor, {name}", "none", plain[name], tokens), Case(f"anchor, {name}", "held", held, tokens)]
    return cases, {name: step.bytes for name, step in plain.items()}


def known(name: str) -> Any:
    """Return a method of the project as its YAML describes it."""
    return config.build_method(config.read_group("method", name))


class Step:
    """A model that makes the same optimizer step whenever it is called.

    Attributes:
        bytes: Size of the weights that train.
    """

    def __init__(self, run: Run, method: Adaptation, anchor: Anchor, device: torch.device) -> None:
        """Build the model, its optimizer and its rows."""
        load = partial(load_model, run.backbone)
        asked = config.replace(run, method=method)
        self.model = method.build(asked, Material(backbone=load)).to(device).train()
        size = run.train.batch_size
        vocabulary = self.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        self.rows = torch.randint(vocabulary, (size, run.train.sequence_length + 1)).to(device)
        self.held = torch.arange(size, device=device) >= size - max(1, round(size * anchor.share))
        hold = None
        if anchor.source != "none":
            hold = Hold(anchor.weight, lambda step: self.held.cpu().numpy(), method.reference(self.model, load))
        self.job = Job(settings=run.train, steps=1, lr=1e-6, folder=Path(), validate=dict, hold=hold)
        self.optimizer = make_optimizer(self.model, self.job)
        self.device = device
        self.bytes = sum(parameter.nbytes for parameter in trainable(self.model).values())

    def __call__(self) -> None:
        """Make a step as the loop does."""
        accumulate(self.model, self.rows, self.held if self.job.hold else None, self.job, self.device)
        torch.nn.utils.clip_grad_norm_(trainable(self.model).values(), self.job.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
