"""AdamW and its learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from mode.config.train import Train
from mode.core.errors import ConfigError
from mode.core.tensors import list_trainable


def make_optimizer(model: nn.Module, lr: float, scales: Mapping[str, float], settings: Train) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters: weight decay for matrices alone, learning rates scaled by name.

    Args:
        model: A model; those of its parameters that require a gradient train.
        lr: Peak learning rate.
        scales: Factor on the learning rate for parameters whose name contains the key.
        settings: Settings of the loop, for weight decay and decay rates.

    Raises:
        ConfigError: No parameter requires a gradient.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in list_trainable(model).items():
        scale = next((value for part, value in scales.items() if part in name), 1.0)
        decay = settings.optim.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    if not groups:
        raise ConfigError("nothing to train: every parameter of this model is frozen")
    return torch.optim.AdamW(
        [{"params": members, "weight_decay": decay, "peak": lr * scale} for (scale, decay), members in groups.items()],
        lr=lr,
        betas=settings.optim.betas,
        fused=True,
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set the learning rate of every group to a share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def schedule(step: int, steps: int, settings: Train) -> float:
    """Return the learning rate of a step as a share of its peak: linear warm-up, then a cosine.

    >>> from mode.config.train import Optim
    >>> settings = Train(optim=Optim(warmup_ratio=0.2, min_lr_ratio=0.1))
    >>> [round(schedule(step, 10, settings), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.55, 0.134]
    """
    warmup = math.ceil(settings.optim.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    least = settings.optim.min_lr_ratio
    return least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * progress))
