"""Choose the layout of a run over its processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mode.config.train import Train
from mode.core import processes
from mode.core.errors import ConfigError
from mode.distributed.layout import DDP
from mode.ops.penalty import WeightPenalty

if TYPE_CHECKING:
    from mode.distributed.mpmd import MPMD


def check_processes(settings: Train) -> None:
    """Check that the settings of the loop go with the number of processes.

    Raises:
        ConfigError: The layout needs several processes, or the rows do not divide over the processes.
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
        others = "".join(f" and {name}={count}" for name, count in parts.items() if count > 1)
        raise ConfigError(f"train.batch.size={rows} does not divide over {size} processes{others}")


def choose_layout(model: nn.Module, settings: Train, device: torch.device, *, anchored: bool) -> DDP | MPMD:
    """Return the layout of a model over the processes of this run.

    Args:
        model: The model.
        settings: Settings of the loop.
        device: Device of this process.
        anchored: Whether the objective has an anchor term.

    Raises:
        ConfigError: The layout does not fit the model or the number of processes, or the rows do not divide.
    """
    layout = settings.parallelism.strategy
    check_processes(settings)
    if layout == "mpmd" and anchored:
        raise ConfigError(
            "train.parallelism.strategy=mpmd: an anchored model needs its backbone everywhere; take ddp, fsdp or tp"
        )
    if layout != "ddp" and any(isinstance(module, WeightPenalty) for module in model.modules()):
        raise ConfigError(f"train.parallelism.strategy={layout}: a penalty on weights needs all of them; take ddp")
    if layout == "mpmd":
        from mode.distributed.mpmd import MPMD

        return MPMD(model, device, settings.parallelism.microbatches_in_flight, settings.parallelism.placement)
    if layout == "fsdp":
        from mode.distributed.fsdp import FSDP

        return FSDP(model)
    if layout == "tp":
        from mode.distributed.tensor_parallel import TensorParallel

        return TensorParallel(model)
    return DDP(model)
