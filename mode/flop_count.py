"""What a step of training takes, counted by torch, to hold the closed forms of `mode.cost` against."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mode.cost import Flops
from mode.loss import head, hidden_states
from mode.modular import even_load


def counted(model: nn.Module, rows: Tensor, context: AbstractContextManager[Any]) -> Flops:
    """Count what a step takes per token, by torch's counter, over a forward and a backward pass on a few rows.

    The head is added by its formula, since the counter does not see into the loss that is fused with it. Gates that
    keep `top_k` branches keep each for as many tokens, and those with `top_p` keep all. The model's
    gradients are gone afterwards; its weights are as they were.

    Args:
        model: A causal LM, ready to train.
        rows: Tokens, (B, S).
        context: Context of the forward pass, such as autocast.
    """
    with Counter() as counter:
        with context, even_load(model):
            states = hidden_states(model, rows)
        forward = counter.total
        if states.requires_grad:
            torch.autograd.backward(states, torch.ones_like(states))
    model.zero_grad(set_to_none=True)
    weight, passes = head(model), states.requires_grad
    backward = counter.total - forward
    last = Flops(2.0 * weight.numel(), 2.0 * weight.numel() * (passes + (passes and weight.requires_grad)))
    return Flops(forward / rows.numel(), backward / rows.numel()) + last


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by torch's formulas, all in one: torch's own counter asks of which module each is.

    Attributes:
        total: Operations so far.
    """

    def __init__(self) -> None:
        """Begin at nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.formulas = FlopCounterMode(display=False, custom_mapping=attention()).flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation, and count it if there is a formula for it."""
        given = kwargs or {}
        out = func(*args, **given)
        formula: Any = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **given, out_val=out)
        return out


KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
"""Torch's attention. Its counter does not know the first, and of the others no groups of heads before 2.13."""


def attention() -> dict[Any, Any]:
    """Return the formulas of attention's kernels."""
    formulas: Any = flop_counter

    def spread(query: Any, other: Any) -> Any:
        return other[0], query[1], *other[2:]

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return formulas.sdpa_flop_count(query, spread(query, key), spread(query, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return formulas.sdpa_backward_flop_count(grad, query, spread(query, key), spread(query, value))

    aten: Any = torch.ops.aten
    forwards = {getattr(aten, f"_scaled_dot_product_{name}"): forward for name in KERNELS}
    return forwards | {getattr(aten, f"_scaled_dot_product_{name}_backward"): backward for name in KERNELS}
