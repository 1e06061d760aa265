"""The device of a run: threads, choice, name and memory."""

from __future__ import annotations

import resource
import sys
import time

import torch

from mode.checked import ConfigError
from mode.settings import Run


def set_up(run: Run) -> torch.device:
    """Set threads and choose the device."""
    torch.set_num_threads(run.train.threads)
    if run.train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda: this machine has no CUDA device; train.device=auto takes what there is")
    cuda = run.train.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def has_cuda() -> bool:
    """Say whether this machine has a CUDA device."""
    return torch.cuda.is_available()


def device_name(device: torch.device) -> str:
    """Return a device's type, and the name of an accelerator."""
    return f"cuda ({torch.cuda.get_device_name()})" if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """Return the peak of this process in bytes: allocated on an accelerator, else resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def matrix_rate(device: torch.device, size: int = 1024) -> float:
    """Measure how many floating-point operations a second this device does on a product of matrices, in fp32."""
    left, right = torch.randn(2, size, size, device=device)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return float(2 * size**3 / best)
