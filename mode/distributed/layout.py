"""A model replicated in every process, each with its part of the rows of a step (DDP)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mode.core import processes
from mode.core.tensors import list_trainable


class DDP:
    """Data parallelism, and the layout of a single process: every process has the whole model and a part of the rows.

    The other layouts have the same methods.

    Attributes:
        slots: Processes that share every row: 1.
        supports_bf16_weights: Whether frozen matrices can be in bf16 during a step.
        model: The model that trains.
        trained: Its trainable parameters.
    """

    slots = 1
    supports_bf16_weights = True

    def __init__(self, model: nn.Module) -> None:
        """Take a model, with its frozen parameters marked."""
        self.model = model
        self.trained = list(list_trainable(model).values())

    def enter_step(self) -> AbstractContextManager[None]:
        """Return the context of forward and backward: nothing changes."""
        return nullcontext()

    def select_rows(self, values: Tensor) -> Tensor:
        """Return those rows of a step, (B, ...), that this process reads."""
        return processes.shard_rows(values)

    def select_loss_rows(self, rows: Tensor) -> Tensor:
        """Return those of the rows read, (B, ...), whose loss this process computes: all of them."""
        return rows

    def derive_seed(self, seed: int) -> int:
        """Return this process's own seed."""
        return processes.derive_seed(seed, processes.rank())

    def wrap(self, objective: Any, make_optimizer: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
        """Return the objective with gradients averaged over all processes, and its optimizer.

        Args:
            objective: The objective; a module whose method `around` returns the same objective of another model.
            make_optimizer: Makes the optimizer of a model.
        """
        return processes.replicate(objective), make_optimizer(self.model)

    def find_local_parameters(self) -> dict[str, nn.Parameter]:
        """Return this process's trainable parameters, by name; of a sharded weight, this process's shard."""
        return list_trainable(self.model)

    def clip_gradients(self, max_norm: float) -> None:
        """Scale the gradients so that their global norm is at most `max_norm`."""
        torch.nn.utils.clip_grad_norm_(self.trained, max_norm)

    def gather_weights(self, due: bool) -> None:
        """Complete the weights of the model that is scored: here every process has all of them.

        Args:
            due: Whether the model is scored or saved now.
        """
