"""Several processes that train one model, as torchrun starts them: as a rule each has its part of the rows of a step.

Alone, nothing here does anything. Otherwise the first process is the one that writes. All of them call what is said to
be for all in the same order; the first of those calls waits until they have met.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

Rows = TypeVar("Rows", bound=Any)


GOLDEN = 0x9E3779B97F4A7C15
"""Odd constant that spreads the ranks over the seeds."""


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number among them, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Say whether this process is the one that writes."""
    return rank() == 0


def local_rank() -> int:
    """Return this process's number on its machine, which is that of its accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def ensure_initialized() -> None:
    """Wait, once, until all processes are there."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        if local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


@functools.cache
def side_group() -> Any:
    """Return a group of all processes for what goes on beside training, or None alone. For all."""
    if world_size() == 1:
        return None
    from torch import distributed

    ensure_initialized()
    return distributed.new_group(backend="gloo")


def wait() -> None:
    """Wait until all processes have come here. For all."""
    broadcast_decision(True)


def broadcast_decision(answer: bool) -> bool:
    """Return the first process's answer. For all."""
    if world_size() == 1:
        return answer
    import torch
    from torch import distributed

    ensure_initialized()
    told = torch.tensor([int(answer)])
    distributed.broadcast(told, 0)
    return bool(told)


@contextmanager
def main_first() -> Iterator[None]:
    """Let the first process through before the others, who then find what it made. For all."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum of every process's values. For all."""
    if world_size() == 1:
        return values
    from torch import distributed

    ensure_initialized()
    summed = values.clone()
    distributed.all_reduce(summed)
    return summed


def all_reduce_mean(values: Tensor) -> Tensor:
    """Return the mean of every process's values. For all."""
    return values if world_size() == 1 else all_reduce_sum(values) / world_size()


def shard_rows(rows: Rows) -> Rows:
    """Return this process's part of the rows of a step, which all have.

    >>> shard_rows([1, 2, 3, 4])
    [1, 2, 3, 4]
    """
    part = len(rows) // world_size()
    mine: Rows = rows[rank() * part : (rank() + 1) * part]
    return mine


def derive_seed(seed: int, number: int) -> int:
    """Return a seed for one of several; that of the first is the one given.

    >>> derive_seed(5, 0), derive_seed(5, 1) != 5
    (5, True)
    """
    return (seed + number * GOLDEN) % 2**64


def replicate(module: nn.Module) -> nn.Module:
    """Return a module whose gradients are the mean over all processes, wherever a backward pass ends. For all.

    What no process used has no gradient, as in a single process.
    """
    if world_size() == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    ensure_initialized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a later torch calls the last setting otherwise
        return DistributedDataParallel(module, find_unused_parameters=True, broadcast_buffers=False)


def no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Let backward passes add to gradients that stay this process's own for now."""
    held: AbstractContextManager[None] = getattr(module, "no_sync", nullcontext)()
    return held


def is_peer_lost(error: RuntimeError) -> bool:
    """Say whether an error is that another process is gone: torch has no class of its own for it with gloo."""
    from torch import distributed

    return world_size() > 1 and (isinstance(error, distributed.DistError) or "gloo" in str(error))


def describe_layout(kind: str) -> dict[str, Any]:
    """Describe how a run is spread over processes; empty alone."""
    return {} if world_size() == 1 else {"layout": {"kind": kind, "processes": world_size()}}
