"""What a machine can do at most, measured among what is compared with it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mode.timing import Case

MACHINE = "machine"
"""The job of these cases."""
SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices."""


def limits(device: torch.device) -> list[Case]:
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
