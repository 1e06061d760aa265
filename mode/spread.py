"""How a training step is spread over processes: copies that share rows, shards, slices, or branches side by side."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mode import parallel
from mode.checked import ConfigError
from mode.tensors import trainable
from mode.train_settings import Train

if TYPE_CHECKING:
    from mode.mpmd import Branches
    from mode.objective import Objective


class Copies:
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
        self.learning = list(trainable(model).values())

    def __call__(self) -> AbstractContextManager[None]:
        """Do nothing about a step."""
        return nullcontext()

    def rows(self, values: Any) -> Any:
        """Return the rows of a step that this process reads."""
        return parallel.share(values)

    def part(self, rows: Tensor) -> Tensor:
        """Return the rows whose loss this process has: all that it reads."""
        return rows

    def seed(self, seed: int) -> int:
        """Return a seed of this process's own."""
        return parallel.own_seed(seed, parallel.rank())

    def wrap(self, objective: Objective, make: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
        """Return what a step runs, with gradients that are the mean over all processes, and its optimizer.

        Args:
            objective: What a step minimises.
            make: Makes an optimizer of a model.
        """
        return parallel.replicated(objective), make(self.model)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what trains and is here, by name; of a weight in shards this process's."""
        return trainable(self.model)

    def clip(self, most: float) -> None:
        """Scale gradients so that their norm is `most` at most."""
        torch.nn.utils.clip_grad_norm_(self.learning, most)

    def collect(self, due: bool) -> None:
        """Do nothing to make the model whole, since every process has all of it.

        Args:
            due: Whether the whole model is wanted now.
        """


def check(settings: Train) -> None:
    """Refuse settings of the loop that do not go with the number of processes.

    Raises:
        ConfigError: A layout is for several, or rows do not divide over them.
    """
    size = parallel.size()
    if settings.layout != "ddp" and size == 1:
        raise ConfigError(f"train.layout={settings.layout} needs several processes: `mode launch --nproc 2 train ...`")
    rows, accumulate, in_flight = settings.batch_size, settings.accumulate, settings.in_flight
    if settings.layout != "tp" and rows % (accumulate * in_flight * size):
        parts = {"train.accumulate": accumulate, "train.in_flight": in_flight}
        told = "".join(f" and {name}={count}" for name, count in parts.items() if count > 1)
        raise ConfigError(f"train.batch_size={rows} does not divide over {size} processes{told}")


def spread_over(model: nn.Module, held: bool, settings: Train, device: torch.device) -> Copies | Branches:
    """Spread a model over the processes that there are.

    Args:
        model: The model.
        held: Whether it is held to its backbone on some rows.
        settings: The loop's.
        device: This process's.

    Raises:
        ConfigError: The layout does not fit the model or the number of processes, or rows do not divide.
    """
    layout = settings.layout
    check(settings)
    if layout == "mpmd" and held:
        raise ConfigError("train.layout=mpmd: an anchored model needs its backbone everywhere; take ddp, fsdp or tp")
    made: Copies | Branches
    if layout == "mpmd":
        from mode.mpmd import Branches

        made = Branches(model, device, settings.in_flight, settings.placement)
    elif layout == "fsdp":
        from mode.shards import Shards

        made = Shards(model)
    elif layout == "tp":
        from mode.slices import Slices

        made = Slices(model)
    else:
        made = Copies(model)
    return made
