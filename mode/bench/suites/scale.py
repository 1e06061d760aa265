"""Suite `scale`: time of a step by numbers of experts, blocks, layers and tokens, and by vocabulary size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mode.backbone.load import load_model
from mode.backbone.shape import read_shape
from mode.backbone.structure import find_layer_stack
from mode.bench.suites.step import Step
from mode.bench.timing import Case
from mode.config.check import replace_settings
from mode.config.method import Anchor
from mode.methods.anchored import Adaptation
from mode.modular.block import find_blocks
from mode.ops.loss import compute_hidden_states

if TYPE_CHECKING:
    from torch import nn

    from mode.config.run import Run
    from mode.methods.mode import MoDE

STAY = "two branches of every token stay"
"""Name of variants with `top_k=2`, in records."""


def prepare_scale(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return cases that vary one quantity of a step at a time: experts, their layers, blocks, rows or vocabulary.

    If time follows the closed form of the operations, the share of the machine's peak rate is constant.

    Args:
        run: Run with the backbone, the batch size and the sequence length. Longer rows are fewer, so that the tokens of
            a step stay the same. For a backbone with random weights, the vocabulary is varied too.
        method: Method with the shape of blocks, experts and gates that are not varied.
        device: Device of the models.
        folder: Not used.
    """
    count, size, length = len(read_shape(run.backbone).layers), run.train.batch.size, run.train.sequence_length
    fresh = partial(replace_settings, method, start="fresh", experts=(), num_experts=1)
    two = replace_settings(method.gate, top_k=2)
    divisors = [number for number in range(1, count + 1) if count % number == 0]
    jobs: dict[str, dict[str, tuple[Adaptation, dict[str, int]]]] = {
        "experts": {f"N = {number}": (fresh(num_experts=number), {}) for number in (1, 2, 4, 8, 16)}
        | {f"N = {number}, {STAY}": (fresh(num_experts=number, gate=two), {}) for number in (4, 8, 16)},
        "blocks": {f"B = {number}": (fresh(num_blocks=number, expert_layers=1), {}) for number in divisors},
        "layers of an expert": {
            f"l = {number}": (fresh(expert_layers=number), {}) for number in range(1, count // method.num_blocks + 1)
        },
        "tokens of a row": {
            f"S = {length * part}": (fresh(), {"sequence_length": length * part, "batch.size": size // part})
            for part in (1, 2, 4)
            if size % part == 0
        },
    }
    if run.backbone.random is not None:
        sizes = [read_shape(run.backbone).vocabulary * part // 4 for part in (1, 2, 4, 8, 16)]
        jobs["vocabulary"] = {f"V = {number}": (fresh(), {}) for number in sizes}
    cases = []
    for job, variants in jobs.items():
        for name, (settings, changes) in variants.items():
            changed = replace_settings(run, train=replace_settings(run.train, **changes))
            if job == "vocabulary":
                changed = replace_vocabulary(changed, int(name.removeprefix("V = ")))
            change = force_even_gates if STAY in name else lambda model: None
            cases.append(Step(changed, settings, Anchor(), device, change).case(job, name))
    step = Step(run, fresh(), Anchor(), device)
    shared, states = make_first_block(run, method, step.batch.tokens)
    cases += [step.case("what runs on the same rows can share", "MoDE, one expert")]
    cases += [
        replace(cases[-1], variant="first block of the backbone, forward", action=shared, flops=0.0, counted=False)
    ]
    return cases, {"weights of an expert": step.bytes, "states after the first block, a step": states}


def replace_vocabulary(run: Run, number: int) -> Run:
    """Return a run whose backbone of random weights has a vocabulary of another size."""
    assert run.backbone.random is not None
    shape = {**run.backbone.random.config, "vocab_size": number}
    random = replace_settings(run.backbone.random, config=shape)
    changed: Run = replace_settings(run, backbone=replace_settings(run.backbone, random=random))
    return changed


def force_even_gates(model: nn.Module) -> None:
    """Give every branch the same number of tokens, as the closed form assumes; fresh gates choose alike for all."""
    for block in find_blocks(model):
        block.execution = replace(block.execution, balanced=True)


def make_first_block(run: Run, method: MoDE, rows: torch.Tensor) -> tuple[Callable[[], None], int]:
    """Return an action that runs the backbone's first block, and the bytes of its output.

    No expert changes this part of a step. Experts that train on the same rows could share it.
    """
    model = load_model(run.backbone).to(rows.device).eval()
    trunk, name = find_layer_stack(model)
    layers = getattr(trunk, name)
    setattr(trunk, name, layers[: len(layers) // method.num_blocks])
    model.config.num_hidden_layers = len(getattr(trunk, name))

    @torch.no_grad()
    def action() -> None:
        compute_hidden_states(model, rows[:, :-1])

    return action, 4 * rows[:, :-1].numel() * read_shape(run.backbone).hidden
