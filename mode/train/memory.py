"""Choose the layers whose activations are recomputed, by measuring the memory of a training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mode.config.check import replace_settings
from mode.core.device import measure_allocated
from mode.core.errors import ConfigError
from mode.core.tensors import list_trainable
from mode.train.loop import forward_backward
from mode.train.objective import Objective
from mode.train.step_options import StepOptions

if TYPE_CHECKING:
    from mode.config.train import Train
    from mode.train.objective import AnchorTerm
    from mode.train.step_batch import StepBatch

CHOICES = ("all", "frozen", "none")
"""Layers whose activations are recomputed, from the least memory to the fastest step."""


def choose_checkpointing(
    model: nn.Module,
    settings: Train,
    anchor: AnchorTerm | None,
    document_end: int | None,
    read: Callable[[], StepBatch],
) -> str:
    """Return the layers to recompute so that a step takes no more than `settings.memory.budget_gb`.

    Forward and backward of a step are run for one choice after the other, until one exceeds the limit. Weights,
    gradients and both moments of AdamW count too. The model and the state of random numbers are as before.

    Args:
        model: The model, with its frozen parameters marked.
        settings: Settings of the loop, with `activation_checkpointing=auto`.
        anchor: The anchor term of the objective.
        document_end: Token that ends a document, where attention is masked across documents.
        read: Reads the batch of the first step.

    Raises:
        ConfigError: Every choice exceeds the limit, or the device's memory.
    """
    assert settings.memory.budget_gb is not None
    device = next(model.parameters()).device
    resident = sum(part.nbytes for part in (*model.parameters(), *model.buffers()))
    resident += 2 * sum(part.nbytes for part in list_trainable(model).values())
    model.train()
    best, least = None, None
    for choice in CHOICES:
        chosen = replace_settings(settings, **{"memory.activation_checkpointing": choice, "memory.budget_gb": None})
        needed = None
        step = make_step(model, chosen, anchor, document_end, read)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), suppress(torch.OutOfMemoryError):
            needed = resident + measure_allocated(step, device)
        model.zero_grad(set_to_none=True)
        least = least or needed
        if needed is None or needed > 1e9 * settings.memory.budget_gb:  # the next choice needs more memory
            break
        best = choice
    if best is not None:
        return best
    if least is None:
        raise ConfigError("train.memory.activation_checkpointing=auto: a step does not fit on this device at all")
    raise ConfigError(
        f"train.memory.budget_gb={settings.memory.budget_gb:g}: a step takes {least / 1e9:.3g} GB at least; "
        "more train.batch.gradient_accumulation_steps takes less"
    )


def make_step(
    model: nn.Module,
    settings: Train,
    anchor: AnchorTerm | None,
    document_end: int | None,
    read: Callable[[], StepBatch],
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that runs forward and backward of a step."""
    objective = Objective(model, settings, anchor, document_end=document_end)

    def run_step() -> tuple[Tensor, Tensor]:
        options = StepOptions(model, settings, half=objective.precision == "bf16")  # its bf16 copies count as well
        batch = read()
        with options:
            return forward_backward(objective, batch, settings.batch.gradient_accumulation_steps)

    return run_step
