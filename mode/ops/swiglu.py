"""Gated feed-forward layers that keep less for the backward pass than `transformers` does, to the same bits.

Products of what is kept are formed again: on a processor that takes less time than to keep them.

Shapes: d hidden size, f size inside of the layer; what is before them is any.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import SiLUActivation


def apply_feed_forward(layer: Any, states: Tensor) -> Tensor:
    """Stand in for the forward pass of a feed-forward layer whose code is Llama's.

    Args:
        layer: The library's module, with `gate_proj`, `up_proj`, `down_proj` and `act_fn`.
        states: What it is given, (..., d).
    """
    gate, up = layer.gate_proj(states), layer.up_proj(states)
    act, down = layer.act_fn, layer.down_proj
    result: Tensor
    if not (isinstance(act, nn.SiLU | SiLUActivation) and type(gate) is type(up) is Tensor and gate.dtype is up.dtype):
        result = down(act(gate) * up)  # other activations, and slices
    elif is_plain_trainable(down) and down.weight.dtype is gate.dtype:
        result = FeedForwardFunction.apply(gate, up, down.weight)  # type: ignore[no-untyped-call]
    else:  # nothing keeps what it is given, or it is another's to say what is kept
        result = down(SwiGLUFunction.apply(gate, up))  # type: ignore[no-untyped-call]
    return result


def is_plain_trainable(module: nn.Module) -> bool:
    """Say whether a module is a matrix that trains, and nothing else."""
    if type(module) is not nn.Linear or module.bias is not None or type(module.weight) is not nn.Parameter:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return module.weight.requires_grad and not any(hooks)


class SwiGLUFunction(Function):
    """silu(gate) times up (Shazeer, arXiv 2002.05202, section 2), of which autograd would keep silu(gate) too."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply both, (..., f)."""
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of both, rounded as by autograd."""
        gate, up = ctx.saved_tensors
        for_gate, for_up = ctx.needs_input_grad
        return (
            backward_silu(slope * up, gate) if for_gate else None,
            functional.silu(gate).mul_(slope) if for_up else None,
        )


class FeedForwardFunction(Function):
    """The same and the matrix after it, which trains: autograd would keep what it multiplies as well."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """Multiply both, (..., f), and the product with a matrix, (d, f)."""
        ctx.save_for_backward(gate, up, weight)
        return functional.linear(functional.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return the gradients of all three, rounded as by autograd."""
        gate, up, weight = ctx.saved_tensors
        for_gate, for_up, _ = ctx.needs_input_grad
        slope, active = slope.reshape(-1, slope.shape[-1]), functional.silu(gate)
        for_weight = slope.t().mm((active * up).reshape(-1, up.shape[-1]))
        inside = slope.mm(weight).view(up.shape)
        up_slope = active.mul_(inside) if for_up else None
        return backward_silu(inside.mul_(up), gate) if for_gate else None, up_slope, for_weight


def backward_silu(slope: Tensor, states: Tensor) -> Tensor:
    """Return the gradient of what silu is given, in the place of that of what it gives."""
    return torch.ops.aten.silu_backward.grad_input(slope, states, grad_input=slope)  # type: ignore[no-any-return]
