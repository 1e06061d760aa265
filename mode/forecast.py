"""What a run should train and take, worked out before it, and what it took, counted after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mode.flop_count import counted
from mode.method import Method, anchoring_flops
from mode.objective import autocast, precision_of
from mode.settings import Run

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Forecast:
    """What a run is to train.

    Attributes:
        steps: Optimizer steps.
        tokens: Tokens trained on.
        flops: Floating-point operations of training.
        total: Parameters of the model.
        trainable: Parameters that train.
        added: Parameters beside the backbone's.
        active: Most parameters that a token's prediction can depend on.
    """

    steps: int
    tokens: int
    flops: float
    total: int
    trainable: int
    added: int
    active: int

    @property
    def memory(self) -> int:
        """Bytes of weights, and of gradients and moments of what trains, in fp32; activations come on top.

        Where frozen weights are held in eight bits it is less.
        """
        return 4 * (self.total + 3 * self.trainable)


def forecast(run: Run) -> Forecast | None:
    """Work out one run's own stage from its settings; None where its method does not say what it costs.

    Raises:
        ConfigError: The settings do not fit the backbone or the budget.
    """
    method = run.method
    cost = method.cost(run) if isinstance(method, Method) else None
    if cost is None or not isinstance(method, Method):
        return None
    steps = method.steps(run)
    tokens = steps * run.train.batch_size * run.train.sequence_length
    return Forecast(
        steps=steps,
        tokens=tokens,
        flops=tokens * (cost.flops.total + anchoring_flops(run)),
        total=cost.total,
        trainable=cost.trainable,
        added=cost.added,
        active=cost.active,
    )


def count(run: Run, model: nn.Module) -> float:
    """Return the operations that training takes per token, counted by torch on one row of the model as it trains.

    Where nothing trains it is none.

    What the backbone's own predictions take, where the model is held to them, is added by its formula.

    The state of random numbers is as it was afterwards.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return 0.0
    device = next(model.parameters()).device
    row = torch.zeros(1, run.train.sequence_length, dtype=torch.long, device=device)
    was_training = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws
        found = counted(model.train(), row, autocast(precision_of(run.train, model), device)).total
    model.train(was_training)
    return found + anchoring_flops(run)
