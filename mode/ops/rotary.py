"""Rotary embeddings for CPUs: bit-identical to `transformers`, with fewer passes over memory.

Shapes: B rows, S tokens per row, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Replace `apply_rotary_pos_emb` of `transformers`.

    Args:
        q: Queries, (B, H, S, D).
        k: Keys, of the same shape, with as many heads or fewer.
        cos: Cosines of every token's angles, (B or 1, S, D); both halves of the last dimension are the same.
        sin: Sines of the angles, of the same shape.
        unsqueeze_dim: Dimension of the heads in queries and keys.

    Returns:
        The rotated queries and keys.
    """
    angles = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return RotaryFunction.apply(q, *angles), RotaryFunction.apply(k, *angles)  # type: ignore[no-untyped-call]


class RotaryFunction(Function):
    """Queries or keys rotated by the angles of their tokens (RoFormer, arXiv 2104.09864, equation 34).

    The library makes a copy in which the halves of every head are swapped, and autograd makes a tensor of zeros for the
    gradient of each half. This function adds the products to the halves in place, with the same rounding.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate heads, (B, H, S, D), by angles, (B or 1, 1, S, D)."""
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Rotate the gradient back, with the rounding and memory layout of autograd, over which norms of heads sum."""
        cos, sin = ctx.saved_tensors
        (first, second), (low, high) = grad.chunk(2, -1), sin.chunk(2, -1)
        result = grad.new_empty(grad.shape, dtype=ctx.kind)
        torch.mul(grad, cos, out=result)
        one, two = result.chunk(2, -1)
        one.add_((second * high).to(ctx.kind))
        two.sub_((first * low).to(ctx.kind))
        return result, None, None
