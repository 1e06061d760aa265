"""Choose what a training step keeps in memory, by measuring it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mode.config.check import replace_settings
from mode.core.device import measure_allocated
from mode.core.errors import ConfigError
from mode.core.tensors import trainable_parameters
from mode.train.loop import accumulate
from mode.train.objective import Objective
from mode.train.step_options import StepOptions

if TYPE_CHECKING:
    from mode.config.train import Train
    from mode.train.objective import AnchorTerm

CHOICES = ("all", "frozen", "none")
"""Layers that form activations again, from the choice of the least memory to the fastest."""


def choose_checkpointing(
    model: nn.Module, settings: Train, hold: AnchorTerm | None, end: int | None, given: Callable[[], tuple[Any, ...]]
) -> str:
    """Return which layers are to form activations again so that a step takes no more than `settings.memory`.

    The passes of a step are run for one choice after the other until one takes more; weights, gradients and both
    moments of AdamW count too. The model and the state of random numbers are as before.

    Args:
        model: The model, with what is frozen frozen.
        settings: The loop's, with `activation_checkpointing=auto`.
        hold: How the model is held to its backbone.
        end: Token that closes a document, where documents do not see each other.
        given: Returns rows, which of them are held, and their kinds, of the first step.

    Raises:
        ConfigError: No choice takes so little, or the device has too little for any.
    """
    assert settings.memory.budget_gb is not None
    device = next(model.parameters()).device
    resident = sum(part.nbytes for part in (*model.parameters(), *model.buffers()))
    resident += 2 * sum(part.nbytes for part in trainable_parameters(model).values())
    model.train()
    best, least = None, None
    for choice in CHOICES:
        chosen = replace_settings(settings, **{"memory.activation_checkpointing": choice, "memory.budget_gb": None})
        needed = None
        with torch.random.fork_rng([device] if device.type == "cuda" else []), suppress(torch.OutOfMemoryError):
            needed = resident + measure_allocated(make_step(model, chosen, hold, end, given), device)
        model.zero_grad(set_to_none=True)
        least = least or needed
        if needed is None or needed > 1e9 * settings.memory.budget_gb:  # the next takes more, maybe more than there is
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
    model: nn.Module, settings: Train, hold: AnchorTerm | None, end: int | None, given: Callable[[], tuple[Any, ...]]
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return what runs the passes of a step."""
    objective = Objective(model, settings, hold, end=end)

    def action() -> tuple[Tensor, Tensor]:
        layers = StepOptions(model, settings, half=objective.precision == "bf16")  # its copies count as well
        rows, held, kinds = given()
        with layers:
            return accumulate(objective, rows, settings.batch.gradient_accumulation_steps, held, kinds)

    return action
