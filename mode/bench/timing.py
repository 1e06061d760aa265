"""Timed cases, interleaved, and the limits of the machine."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One variant of a job.

    Attributes:
        job: What is done; a job's first case is what its others are compared with.
        variant: How it is done.
        action: Does it once.
        tokens: Tokens that it handles; 0 where time itself is what counts.
        flops: Floating-point operations that it takes, if they are known.
        precision: Of those.
        bytes: Bytes that it moves, if that is what it is for.
        resident: Bytes of weights and optimizer states that it keeps from one time to the next.
        counted: Whether its memory is counted.
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


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the paired ratios of two variants."""

    median: float
    low: float
    high: float


def interleave(
    cases: Sequence[Case], rounds: int, done: Callable[[int], None] = lambda number: None
) -> list[list[float]]:
    """Time every case once a round, in an order that is reversed from round to round, after a round that warms up.

    An action that returns seconds, a float, has timed itself, without what it does before and after.

    Args:
        cases: What to time.
        rounds: Rounds that count.
        done: Told the number of every round that is over; the warm-up's is 0.

    Returns:
        Seconds by case and round.
    """
    seconds: list[list[float]] = [[] for _ in cases]
    gc.collect()
    gc.freeze()  # to look before every case through all that is loaded takes half a second
    try:
        for number in range(rounds + 1):
            order = range(len(cases)) if number % 2 else reversed(range(len(cases)))
            for index in order:
                gc.collect()  # garbage of one case is not to be another's time
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
    """Start a clock; what it returns waits for an accelerator and says how many seconds have passed on it, or here."""
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
    """Wait until an accelerator has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compute_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the ratio of two series that were measured in the same rounds.

    >>> compute_ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    Ratio(median=2.0, low=2.0, high=2.5)
    """
    paired = [one / other for one, other in zip(ours, theirs, strict=True)]
    if len(paired) == 1:
        return Ratio(paired[0], paired[0], paired[0])
    low, median, high = statistics.quantiles(paired, n=4, method="inclusive")
    return Ratio(median, low, high)


MACHINE = "machine"
"""The job of these cases."""


SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices."""


def time_limits(device: torch.device) -> list[Case]:
    """Return what times a device's rate of products of large matrices, by precision, and of copying in its memory."""
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
    """Multiply matrices."""
    left @ right


def copy(source: Tensor, target: Tensor) -> None:
    """Copy a tensor over another."""
    target.copy_(source)
