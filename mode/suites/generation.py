"""The suite `generate`: reading a prompt and continuing it with a cache, by the number of experts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mode.backbone import load_model
from mode.suites.edge import LONG, NEW, modular, read, write
from mode.timing import Case

if TYPE_CHECKING:
    import torch

    from mode.modular_method import MoDE
    from mode.settings import Run

NUMBERS = (1, 2, 4, 8)
"""Experts of the models that are measured."""


def generation(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return what to time, and the bytes of every model's weights.

    Args:
        run: Names the backbone.
        method: Shape of blocks, experts and gates.
        device: Where the models are used.
        folder: Not used.
    """
    live = {"backbone": load_model(run.backbone)}
    for number in NUMBERS:
        names = [f"expert-{index + 1}" for index in range(number)]
        live[f"{number} expert{'s' * (number > 1)}"] = modular(run, method, names)
    live = {name: model.to(device).eval() for name, model in live.items()}
    cases = []
    for job, use, tokens in (("read", read, LONG), ("generate", write, NEW)):
        for name, model in live.items():
            cases.append(Case(job, name, partial(use, model), tokens=tokens, counted=True))
    return cases, {name: sum(part.nbytes for part in model.parameters()) for name, model in live.items()}
