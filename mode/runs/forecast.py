"""What a run takes: its training operations and parameters, by closed form, and its operations counted by torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mode.backbone.shape import Flops
from mode.config.run import Run
from mode.config.train import Train
from mode.methods.base import Method
from mode.modular.block import execute_blocks, find_blocks
from mode.ops.loss import compute_hidden_states, find_head
from mode.train.precision import autocast, choose_precision


@dataclass(frozen=True)
class Forecast:
    """What a run is to train and what that takes.

    Attributes:
        steps: Optimizer steps.
        tokens: Tokens trained on.
        flops: Floating-point operations of training.
        total: Parameters of the model.
        trainable: Trainable parameters.
        added: Parameters added to those of the backbone.
        active: Most parameters that a token's prediction can depend on.
    """

    steps: int
    tokens: int
    flops: float
    total: int
    trainable: int
    added: int
    active: int

    @property
    def memory(self) -> int:
        """Bytes of weights, gradients and optimizer state in fp32; activations are not included.

        With frozen weights in eight bits a run takes less.
        """
        return 4 * (self.total + 3 * self.trainable)


def forecast(run: Run) -> Forecast | None:
    """Return the forecast of one run's own stage; None where its method does not implement `cost`.

    Raises:
        ConfigError: The settings do not fit the backbone or the budget.
    """
    method = run.method
    cost = method.cost(run) if isinstance(method, Method) else None
    if cost is None or not isinstance(method, Method):
        return None
    steps = method.steps(run)
    tokens = steps * run.train.batch.size * run.train.sequence_length
    return Forecast(
        steps=steps,
        tokens=tokens,
        flops=tokens * (cost.flops.total + method.anchoring_flops(run)),
        total=cost.total,
        trainable=cost.trainable,
        added=cost.added,
        active=cost.active,
    )


def count_training_flops(model: nn.Module, settings: Train) -> float:
    """Return the floating-point operations of training per token, counted by torch on one row of zeros.

    0 if no parameter trains. The predictions that anchors and weights of tokens take are not included
    (`Method.anchoring_flops`). The state of random numbers is restored.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return 0.0
    device = next(model.parameters()).device
    row = torch.zeros(1, settings.sequence_length, dtype=torch.long, device=device)
    was_training = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws
        flops = count_step_flops(model.train(), row, autocast(choose_precision(settings, model), device)).total
    model.train(was_training)
    return flops


def count_step_flops(model: nn.Module, rows: Tensor, context: AbstractContextManager[Any]) -> Flops:
    """Count a step's operations per token by torch's counter, in a forward and a backward pass over a few rows.

    The head is added by its closed form, since the counter does not see the fused loss. Gates with `top_k` choose every
    branch for the same number of tokens, and gates with `top_p` choose all branches. The model's gradients are
    discarded; its weights do not change.

    Args:
        model: A causal LM, ready to train.
        rows: Tokens, (B, S).
        context: Context of the forward pass, such as autocast.
    """
    with Counter() as counter:
        with context, execute_blocks(find_blocks(model), balanced=True):
            states = compute_hidden_states(model, rows)
        forward = counter.total
        if states.requires_grad:
            torch.autograd.backward(states, torch.ones_like(states))
    model.zero_grad(set_to_none=True)
    weight, backpropagates = find_head(model), states.requires_grad
    backward = counter.total - forward
    head_backward = 2.0 * weight.numel() * (backpropagates + (backpropagates and weight.requires_grad))
    return Flops(forward / rows.numel(), backward / rows.numel()) + Flops(2.0 * weight.numel(), head_backward)


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by torch's formulas in one total; torch's own counter is slower, since it counts by module.

    Attributes:
        total: Operations so far.
    """

    def __init__(self) -> None:
        """Start at 0."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.formulas = FlopCounterMode(display=False, custom_mapping=count_attention()).flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count its operations if torch has a formula for it."""
        given = kwargs or {}
        out = func(*args, **given)
        formula: Any = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **given, out_val=out)
        return out


KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
"""Torch's attention kernels. Its counter lacks the first, and grouped heads in the others before torch 2.13."""


def count_attention() -> dict[Any, Any]:
    """Return the formulas of the attention kernels, with keys and values expanded to the heads of the queries."""
    formulas: Any = flop_counter

    def expand(query: Any, other: Any) -> Any:
        return other[0], query[1], *other[2:]

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return formulas.sdpa_flop_count(query, expand(query, key), expand(query, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return formulas.sdpa_backward_flop_count(grad, query, expand(query, key), expand(query, value))

    aten: Any = torch.ops.aten
    forwards = {getattr(aten, f"_scaled_dot_product_{name}"): forward for name in KERNELS}
    return forwards | {getattr(aten, f"_scaled_dot_product_{name}_backward"): backward for name in KERNELS}
