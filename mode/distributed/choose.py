"""The layout that a run asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mode.config.train import Train
from mode.core import processes
from mode.core.errors import ConfigError
from mode.distributed.layout import DDP

if TYPE_CHECKING:
    from mode.distributed.mpmd import MPMD


def check_processes(settings: Train) -> None:
    """Refuse settings of the loop that do not go with the number of processes.

    Raises:
        ConfigError: A layout is for several, or rows do not divide over them.
    """
    size = processes.world_size()
    strategy, in_flight = settings.parallelism.strategy, settings.parallelism.microbatches_in_flight
    if strategy != "ddp" and size == 1:
        raise ConfigError(
            f"train.parallelism.strategy={strategy} needs several processes: `mode launch --nproc 2 train ...`"
        )
    rows, accumulate = settings.batch.size, settings.batch.gradient_accumulation_steps
    if strategy != "tp" and rows % (accumulate * in_flight * size):
        parts = {
            "train.batch.gradient_accumulation_steps": accumulate,
            "train.parallelism.microbatches_in_flight": in_flight,
        }
        told = "".join(f" and {name}={count}" for name, count in parts.items() if count > 1)
        raise ConfigError(f"train.batch.size={rows} does not divide over {size} processes{told}")


def choose_layout(model: nn.Module, held: bool, settings: Train, device: torch.device) -> DDP | MPMD:
    """Spread a model over the processes that there are.

    Args:
        model: The model.
        held: Whether it is held to its backbone on some rows.
        settings: The loop's.
        device: This process's.

    Raises:
        ConfigError: The layout does not fit the model or the number of processes, or rows do not divide.
    """
    layout = settings.parallelism.strategy
    check_processes(settings)
    if layout == "mpmd" and held:
        raise ConfigError(
            "train.parallelism.strategy=mpmd: an anchored model needs its backbone everywhere; take ddp, fsdp or tp"
        )
    made: DDP | MPMD
    if layout == "mpmd":
        from mode.distributed.mpmd import MPMD

        made = MPMD(model, device, settings.parallelism.microbatches_in_flight, settings.parallelism.placement)
    elif layout == "fsdp":
        from mode.distributed.fsdp import FSDP

        made = FSDP(model)
    elif layout == "tp":
        from mode.distributed.tensor_parallel import TensorParallel

        made = TensorParallel(model)
    else:
        made = DDP(model)
    return made
