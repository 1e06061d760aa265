"""Copies of a model that share the rows of a step (DDP)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mode.core import processes
from mode.core.tensors import trainable_parameters


class DDP:
    """A model that every process has all of, each with its part of the rows (DDP); or a single process's.

    Attributes:
        slots: Processes that a row is shared by: 1.
        halves: Whether frozen matrices can be held in bf16 in a step.
        model: What trains.
    """

    slots = 1
    halves = True

    def __init__(self, model: nn.Module) -> None:
        """Take a model, with what is frozen frozen."""
        self.model = model
        self.learning = list(trainable_parameters(model).values())

    def __call__(self) -> AbstractContextManager[None]:
        """Do nothing about a step."""
        return nullcontext()

    def rows(self, values: Any) -> Any:
        """Return the rows of a step that this process reads."""
        return processes.shard_rows(values)

    def part(self, rows: Tensor) -> Tensor:
        """Return the rows whose loss this process has: all that it reads."""
        return rows

    def seed(self, seed: int) -> int:
        """Return a seed of this process's own."""
        return processes.derive_seed(seed, processes.rank())

    def wrap(self, objective: Any, make: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
        """Return what a step runs, with gradients that are the mean over all processes, and its optimizer.

        Args:
            objective: What a step minimises: a module that can be put `around` another model.
            make: Makes an optimizer of a model.
        """
        return processes.replicate(objective), make(self.model)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what trains and is here, by name; of a weight in shards this process's."""
        return trainable_parameters(self.model)

    def clip(self, most: float) -> None:
        """Scale gradients so that their norm is `most` at most."""
        torch.nn.utils.clip_grad_norm_(self.learning, most)

    def collect(self, due: bool) -> None:
        """Do nothing to make the model whole, since every process has all of it.

        Args:
            due: Whether the whole model is wanted now.
        """
