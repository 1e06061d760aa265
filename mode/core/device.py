"""The device of a run: threads, choice, name and memory."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from mode.core import processes
from mode.core.errors import ConfigError

CPU = torch.profiler.ProfilerActivity.CPU


AT_ONCE = 1024
"""Tokens that a processor reads in one pass when it scores: the activations of more do not stay in its caches."""


def set_up(threads: int, device: str) -> torch.device:
    """Set the threads of torch and choose the device.

    Args:
        threads: Threads of torch on a processor.
        device: `cpu`, `cuda`, or `auto` for what there is.

    Raises:
        ConfigError: There is no CUDA device.
    """
    torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda: this machine has no CUDA device; train.device=auto takes what there is")
    cuda = device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", processes.local_rank()) if cuda else torch.device("cpu")


def choose_rows_per_pass(device: torch.device, batch_size: int, length: int) -> int:
    """Return how many rows of so many tokens to read in one pass: as many as were asked for, or as is faster.

    >>> choose_rows_per_pass(torch.device("cpu"), 16, 256), choose_rows_per_pass(torch.device("cpu"), 2, 256)
    (4, 2)
    """
    return batch_size if device.type != "cpu" else min(batch_size, max(1, AT_ONCE // length))


def has_cuda() -> bool:
    """Say whether this machine has a CUDA device."""
    return torch.cuda.is_available()


def describe_device(device: torch.device) -> str:
    """Return a device's type, and the name of an accelerator."""
    return f"cuda ({torch.cuda.get_device_name()})" if device.type == "cuda" else device.type


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return what is in a processor's memory on a device, which is not waited for: it may have much to do still."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def read_peak_memory(device: torch.device) -> int:
    """Return the peak of this process in bytes: allocated on an accelerator, else resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_allocated(action: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of tensors that an action holds at one time, beyond what there was before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with silence_stderr(), torch.profiler.profile(activities=[CPU], profile_memory=True) as seen:
        action()
    assert seen.profiler is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes), default=0)


@contextmanager
def silence_stderr() -> Iterator[None]:
    """Send what native code writes to standard error nowhere: torch's profiler cannot be told to be quiet."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def measure_matrix_rate(device: torch.device, size: int = 1024) -> float:
    """Measure how many floating-point operations a second this device does on a product of matrices, in fp32."""
    left, right = torch.randn(2, size, size, device=device)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return float(2 * size**3 / best)
