"""Timing of interleaved cases, and the limits of the machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mode.bench.ratios import MACHINE


@dataclass(frozen=True)
class Case:
    """One variant of a job.

    Attributes:
        job: Name of the job. The other cases of a job are compared with its first case.
        variant: Name of the variant.
        action: Runs the variant once. May return its own time in seconds, as a float.
        tokens: Tokens that one run processes; 0 if the case is rated by time.
        flops: Floating-point operations of one run; 0 if unknown.
        precision: Precision of the operations.
        bytes: Bytes that one run moves, if the case measures memory bandwidth.
        resident: Returns the bytes of weights and optimizer state that stay allocated between runs.
        counted: Whether the peak memory is measured.
    """

    job: str
    variant: str
    action: Callable[[], object]
    tokens: int = 0
    flops: float = 0.0
    precision: str = "fp32"
    bytes: int = 0
    resident: Callable[[], int] = lambda: 0
    counted: bool = False


def interleave(
    cases: Sequence[Case], rounds: int, done: Callable[[int], None] = lambda number: None
) -> list[list[float]]:
    """Time every case once per round, after one round of warm-up. The order is reversed from round to round.

    If an action returns a float, this value is taken as its seconds instead of the measured time.

    Args:
        cases: Cases to time.
        rounds: Number of rounds after the warm-up.
        done: Called after every round with its number; 0 is the warm-up.

    Returns:
        Seconds by case and round.
    """
    seconds: list[list[float]] = [[] for _ in cases]
    gc.collect()
    gc.freeze()  # otherwise every collection below scans all loaded objects, half a second each
    try:
        for number in range(rounds + 1):
            order = range(len(cases)) if number % 2 else reversed(range(len(cases)))
            for index in order:
                gc.collect()  # so that the garbage of one case does not slow the next
                synchronize()
                passed = start_clock()
                own = cases[index].action()
                if number:
                    seconds[index].append(own if isinstance(own, float) else passed())
            done(number)
    finally:
        gc.unfreeze()
    return seconds


def start_clock() -> Callable[[], float]:
    """Start a clock and return a function that stops it and returns seconds. On a GPU the clock is a pair of events."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        return lambda: time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()

    def passed() -> float:
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000.0

    return passed


def synchronize() -> None:
    """Wait until a GPU has finished all queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the multiplied matrices, by device type."""


def time_limits(device: torch.device) -> list[Case]:
    """Return cases that measure a device's rate of large matrix products, by precision, and of copies in its memory."""
    size = SIZE[device.type]
    cases = []
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
        name = f"products of matrices, {precision}"
        cases.append(Case(MACHINE, name, partial(multiply, left, right), flops=2.0 * size**3, precision=precision))
    source = torch.empty(16 * size * size, device=device).fill_(1.0)
    target = torch.empty_like(source)
    cases.append(Case(MACHINE, "copy", partial(copy, source, target), bytes=2 * source.nbytes))
    return cases


def multiply(left: Tensor, right: Tensor) -> None:
    """Multiply two matrices."""
    left @ right


def copy(source: Tensor, target: Tensor) -> None:
    """Copy one tensor into another."""
    target.copy_(source)
