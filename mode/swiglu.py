"""Gated feed-forward layers that keep less for the backward pass than `transformers` does, to the same bits.

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


def fed(layer: Any, states: Tensor) -> Tensor:
    """Stand in for the forward pass of a feed-forward layer whose code is Llama's.

    Args:
        layer: The library's module, with `gate_proj`, `up_proj`, `down_proj` and `act_fn`.
        states: What it is given, (..., d).
    """
    gate, act = layer.gate_proj(states), layer.act_fn
    up = layer.up_proj(states)
    if isinstance(act, nn.SiLU | SiLUActivation) and type(gate) is type(up) is Tensor and gate.dtype is up.dtype:
        result: Tensor = layer.down_proj(SwiGLU.apply(gate, up))  # type: ignore[no-untyped-call]
    else:  # other activations, and slices
        result = layer.down_proj(act(gate) * up)
    return result


class SwiGLU(Function):
    """silu(gate) times up (Shazeer, arXiv 2002.05202, equation 6).

    Autograd keeps silu(gate) beside both. To form it again takes a processor less time than to take new memory for it.
    """

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
        for_gate = for_up = None
        if ctx.needs_input_grad[0]:
            for_gate = slope * up
            torch.ops.aten.silu_backward.grad_input(for_gate, gate, grad_input=for_gate)
        if ctx.needs_input_grad[1]:
            for_up = functional.silu(gate).mul_(slope)
        return for_gate, for_up
