"""Rotary embeddings in fewer passes over memory than `transformers` takes, to the same bits, for processors.

Shapes: B rows, S tokens per row, H heads, D size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Stand in for `apply_rotary_pos_emb`.

    Args:
        q: Queries, (B, H, S, D).
        k: Keys, of as many heads or fewer.
        cos: Cosines of every token's angles, (B or 1, S, D), each twice.
        sin: Their sines.
        unsqueeze_dim: Where the heads are in queries and keys.
    """
    angles = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return RotaryFunction.apply(q, *angles), RotaryFunction.apply(k, *angles)  # type: ignore[no-untyped-call]


class RotaryFunction(Function):
    """Queries or keys turned by the angles of their tokens (RoFormer, arXiv 2104.09864, equation 34).

    The library forms a copy with both halves of every head exchanged, and autograd a tensor of zeros for the gradient
    of each half. Here halves are added where they belong, each product rounded as there.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn heads, (B, H, S, D), by angles, (B or 1, 1, S, D)."""
        ctx.save_for_backward(cos, sin)
        ctx.kind = heads.dtype
        (first, second), (low, high) = heads.chunk(2, -1), sin.chunk(2, -1)
        result = heads * cos
        one, two = result.chunk(2, -1)
        one.sub_(second * low)
        two.add_(first * high)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        """Turn the gradient back, rounded and laid out in memory as autograd does it: norms of heads sum over it."""
        cos, sin = ctx.saved_tensors
        (first, second), (low, high) = slope.chunk(2, -1), sin.chunk(2, -1)
        result = slope.new_empty(slope.shape, dtype=ctx.kind)
        torch.mul(slope, cos, out=result)
        one, two = result.chunk(2, -1)
        one.add_((second * high).to(ctx.kind))
        two.sub_((first * low).to(ctx.kind))
        return result, None, None
