"""The device of a run: number of threads, choice, name, memory and speed."""

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


TOKENS_PER_PASS = 1024
"""Most tokens that a CPU scores in one pass. The activations of more tokens do not fit in its caches."""


def set_up(threads: int, device: str) -> torch.device:
    """Set torch's number of threads and choose the device.

    Args:
        threads: Number of torch threads on a CPU.
        device: `cpu`, `cuda`, or `auto`, which means CUDA where it is available.

    Returns:
        The device; with several processes, the accelerator of this process.

    Raises:
        ConfigError: `cuda` is set and the machine has no CUDA device.
    """
    torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda: this machine has no CUDA device; use train.device=auto")
    cuda = device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", processes.local_rank()) if cuda else torch.device("cpu")


def choose_rows_per_pass(device: torch.device, batch_size: int, length: int) -> int:
    """Return the number of rows to score in one pass: the batch size, or fewer on a CPU, where fewer are faster.

    Args:
        device: Device of the model.
        batch_size: Most rows per pass.
        length: Tokens per row.

    >>> choose_rows_per_pass(torch.device("cpu"), 16, 256), choose_rows_per_pass(torch.device("cpu"), 2, 256)
    (4, 2)
    """
    return batch_size if device.type != "cpu" else min(batch_size, max(1, TOKENS_PER_PASS // length))


def has_cuda() -> bool:
    """Return whether this machine has a CUDA device."""
    return torch.cuda.is_available()


def describe_device(device: torch.device) -> str:
    """Return the type of a device; for an accelerator, also its name."""
    return f"cuda ({torch.cuda.get_device_name()})" if device.type == "cuda" else device.type


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device. The copy is asynchronous, so work queued on the device does not delay the CPU."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def read_peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated on an accelerator, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_allocated(action: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes of tensors that an action allocates, above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with silence_stderr(), torch.profiler.profile(activities=[CPU], profile_memory=True) as profile:
        action()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes), default=0)


@contextmanager
def silence_stderr() -> Iterator[None]:
    """Discard what native code writes to standard error. Torch's profiler has no option to be quiet."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def measure_matrix_rate(device: torch.device, size: int = 1024) -> float:
    """Measure the throughput of a device on a matrix product in fp32, in floating-point operations per second."""
    left, right = torch.randn(2, size, size, device=device)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return float(2 * size**3 / best)
