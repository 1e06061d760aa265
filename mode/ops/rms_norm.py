"""Root mean square norms in fewer passes over memory than `transformers` takes, to the same bits, for processors.

Shapes: d hidden size, or size of a head where heads have norms; what is before it is any.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def apply_rms_norm(norm: Any, states: Tensor) -> Tensor:
    """Stand in for the forward pass of a norm whose code is Llama's.

    Args:
        norm: The library's module, with `weight`, (d,), and `variance_epsilon`.
        states: What is normed, (..., d).
    """
    weight, epsilon = norm.weight, norm.variance_epsilon
    if states.dtype is torch.float32 is weight.dtype and type(states) is Tensor and type(weight) is nn.Parameter:
        return RMSNormFunction.apply(states, states, weight, epsilon)  # type: ignore[no-untyped-call,no-any-return]
    wide = states.float()  # in half precision, and in slices, as the library does
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    result: Tensor = weight * scaled.to(states.dtype)
    return result


class RMSNormFunction(Function):
    """x / rms(x) times a weight (Zhang and Sennrich, arXiv 1910.07467, equation 4).

    Autograd goes through what the library computes one operation at a time. Its gradient has two parts, through x and
    through rms(x), that are added to what else x has a gradient from one after the other: so x is given twice, and the
    parts are returned apart. Each is rounded as there.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, again: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Norm states, (..., d), which are given twice."""
        inverse = torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(states, inverse, weight)
        return (states * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return the gradient's two parts, and the weight's."""
        states, inverse, weight = ctx.saved_tensors
        for_weight = None
        if ctx.needs_input_grad[2]:  # what the weight scaled is formed again: to keep it takes memory for no less time
            for_weight = (slope * (states * inverse)).sum_to_size(weight.shape)
        if not ctx.needs_input_grad[0]:
            return None, None, for_weight, None
        direct = slope * weight
        through = -0.5 * (direct * states).sum(-1, keepdim=True) * inverse.pow(3) / states.shape[-1]
        return direct.mul_(inverse), states * (2 * through), for_weight, None
