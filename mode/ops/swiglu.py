"""Gated feed-forward layers for CPUs: bit-identical to `transformers`, with less memory for the backward pass.

The backward pass recomputes element-wise products, which on a CPU is faster than storing and loading them.

Shapes: d hidden size, f intermediate size. The leading dimensions are arbitrary.
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
    """Replace the forward method of a feed-forward layer whose code equals Llama's.

    Args:
        layer: Module of the library with `gate_proj`, `up_proj`, `down_proj` and `act_fn`.
        states: Input, (..., d).
    """
    gate, up = layer.gate_proj(states), layer.up_proj(states)
    act, down = layer.act_fn, layer.down_proj
    result: Tensor
    if not (isinstance(act, nn.SiLU | SiLUActivation) and type(gate) is type(up) is Tensor and gate.dtype is up.dtype):
        result = down(act(gate) * up)  # other activations, and tensor subclasses such as DTensor
    elif is_plain_trainable(down) and down.weight.dtype is gate.dtype:
        result = FeedForwardFunction.apply(gate, up, down.weight)  # type: ignore[no-untyped-call]
    else:  # a frozen matrix stores no input for the backward pass; other modules decide for themselves
        result = down(SwiGLUFunction.apply(gate, up))  # type: ignore[no-untyped-call]
    return result


def is_plain_trainable(module: nn.Module) -> bool:
    """Return whether a module is a trainable linear layer without bias and hooks."""
    if type(module) is not nn.Linear or module.bias is not None or type(module.weight) is not nn.Parameter:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return module.weight.requires_grad and not any(hooks)


class SwiGLUFunction(Function):
    """silu(gate) times up (Shazeer, arXiv 2002.05202, section 2). Autograd would also store silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) times up, (..., f)."""
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of gate and up, with the rounding of autograd."""
        gate, up = ctx.saved_tensors
        for_gate, for_up = ctx.needs_input_grad
        return (
            backward_silu(grad * up, gate) if for_gate else None,
            functional.silu(gate).mul_(grad) if for_up else None,
        )


class FeedForwardFunction(Function):
    """silu(gate) times up, followed by a trainable matrix. Autograd would also store the input of the matrix."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """Apply a matrix, (d, f), to silu(gate) times up, (..., f)."""
        ctx.save_for_backward(gate, up, weight)
        return functional.linear(functional.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return the gradients of gate, up and the matrix, with the rounding of autograd."""
        gate, up, weight = ctx.saved_tensors
        for_gate, for_up, _ = ctx.needs_input_grad
        grad, active = grad.reshape(-1, grad.shape[-1]), functional.silu(gate)
        for_weight = grad.t().mm((active * up).reshape(-1, up.shape[-1]))
        inside = grad.mm(weight).view(up.shape)
        up_grad = active.mul_(inside) if for_up else None
        return backward_silu(inside.mul_(up), gate) if for_gate else None, up_grad, for_weight


def backward_silu(grad: Tensor, states: Tensor) -> Tensor:
    """Return the gradient of silu's input. The result overwrites `grad`, the gradient of silu's output."""
    return torch.ops.aten.silu_backward.grad_input(grad, states, grad_input=grad)  # type: ignore[no-any-return]
