"""Root mean square norms for CPUs: bit-identical to `transformers`, with fewer passes over memory.

Shapes: d hidden size, or head size for norms of heads. The leading dimensions are arbitrary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def apply_rms_norm(norm: Any, states: Tensor) -> Tensor:
    """Replace the forward method of a norm whose code equals Llama's.

    Args:
        norm: Module of the library with `weight`, (d,), and `variance_epsilon`.
        states: Input, (..., d).
    """
    weight, epsilon = norm.weight, norm.variance_epsilon
    if states.dtype is torch.float32 is weight.dtype and type(states) is Tensor and type(weight) is nn.Parameter:
        return RMSNormFunction.apply(states, states, weight, epsilon)  # type: ignore[no-untyped-call,no-any-return]
    wide = states.float()  # the library's operations, for half precision and tensor subclasses such as DTensor
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    result: Tensor = weight * scaled.to(states.dtype)
    return result


class RMSNormFunction(Function):
    """x / rms(x) times a weight (Zhang and Sennrich, arXiv 1910.07467, equation 4).

    The library's gradient of x has two terms: one through x and one through rms(x). Autograd rounds each term and adds
    the terms one after the other to x's other gradients. For bit-identical results this function takes x twice and
    returns the two terms separately, each rounded in the same way.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, duplicate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Normalise states, (..., d), which are passed twice."""
        inverse = torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(states, inverse, weight)
        return (states * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return the two terms of the gradient of x, and the gradient of the weight."""
        states, inverse, weight = ctx.saved_tensors
        for_weight = None
        if ctx.needs_input_grad[2]:  # recompute the normalised states: storing them takes memory and is no faster
            for_weight = (grad * (states * inverse)).sum_to_size(weight.shape)
        if not ctx.needs_input_grad[0]:
            return None, None, for_weight, None
        direct = grad * weight
        through = -0.5 * (direct * states).sum(-1, keepdim=True) * inverse.pow(3) / states.shape[-1]
        return direct.mul_(inverse), states * (2 * through), for_weight, None
