"""Processes that train one model together, as torchrun starts them. Usually each process trains on a shard of the rows.

In a single process these functions do nothing. With several processes, only the main process (rank 0) writes files.
A function marked as collective is called by all processes, in the same order. The first collective call initialises
torch.distributed and waits for all processes.
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
"""Odd constant, 2^64 divided by the golden ratio, that spaces derived seeds apart."""


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's rank among all processes, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Return whether this process is the main process, which writes files."""
    return rank() == 0


def local_rank() -> int:
    """Return this process's rank on its machine. It is also the index of its accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def ensure_initialized() -> None:
    """Initialise torch.distributed on the first call, which waits for all processes."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        if local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


@functools.cache
def make_side_group() -> Any:
    """Return a second group of all processes, for communication outside training; None in a single process.

    Collective.
    """
    if world_size() == 1:
        return None
    from torch import distributed

    ensure_initialized()
    return distributed.new_group(backend="gloo")


def wait() -> None:
    """Wait until all processes reach this call. Collective."""
    broadcast_decision(True)


def broadcast_decision(answer: bool) -> bool:
    """Return the main process's answer in every process. Collective."""
    if world_size() == 1:
        return answer
    import torch
    from torch import distributed

    ensure_initialized()
    decision = torch.tensor([int(answer)])
    distributed.broadcast(decision, 0)
    return bool(decision)


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the main process first, then in the others, which find the main process's files. Collective."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes (all-reduce). Collective."""
    if world_size() == 1:
        return values
    from torch import distributed

    ensure_initialized()
    summed = values.clone()
    distributed.all_reduce(summed)
    return summed


def all_reduce_mean(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes (all-reduce). Collective."""
    return values if world_size() == 1 else all_reduce_sum(values) / world_size()


def shard_rows(rows: Rows) -> Rows:
    """Return this process's shard of the rows of a step. Every process passes all rows.

    >>> shard_rows([1, 2, 3, 4])
    [1, 2, 3, 4]
    """
    size = len(rows) // world_size()
    shard: Rows = rows[rank() * size : (rank() + 1) * size]
    return shard


def derive_seed(seed: int, number: int) -> int:
    """Return a seed for one of several random streams. Number 0 keeps the given seed.

    >>> derive_seed(5, 0), derive_seed(5, 1) != 5
    (5, True)
    """
    return (seed + number * GOLDEN) % 2**64


def replicate(module: nn.Module) -> nn.Module:
    """Wrap a module in DistributedDataParallel, so that backward passes average gradients over processes. Collective.

    A parameter that no process used has no gradient, as in a single process.
    """
    if world_size() == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    ensure_initialized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # later releases of torch deprecate `broadcast_buffers`
        return DistributedDataParallel(module, find_unused_parameters=True, broadcast_buffers=False)


def no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Accumulate gradients in this process without an all-reduce. Does nothing for a module that is not replicated."""
    context: AbstractContextManager[None] = getattr(module, "no_sync", nullcontext)()
    return context


def is_peer_lost(error: RuntimeError) -> bool:
    """Return whether an error means that another process has ended. With gloo, torch has no error class for this."""
    from torch import distributed

    return world_size() > 1 and (isinstance(error, distributed.DistError) or "gloo" in str(error))


def describe_layout(kind: str) -> dict[str, Any]:
    """Describe how a run is distributed over processes. The description is empty for a single process."""
    return {} if world_size() == 1 else {"layout": {"kind": kind, "processes": world_size()}}
