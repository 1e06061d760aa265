"""How long a run will take, from its operations and the rate of the machine."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mode.backbone.shape import Flops
from mode.config.run import Run
from mode.methods.base import Method
from mode.modular.block import force_even_load
from mode.ops.loss import compute_hidden_states, output_head
from mode.train.precision import autocast, choose_precision

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Forecast:
    """What a run is to train.

    Attributes:
        steps: Optimizer steps.
        tokens: Tokens trained on.
        flops: Floating-point operations of training.
        total: Parameters of the model.
        trainable: Parameters that train.
        added: Parameters beside the backbone's.
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
        """Bytes of weights, and of gradients and moments of what trains, in fp32; activations come on top.

        Where frozen weights are held in eight bits it is less.
        """
        return 4 * (self.total + 3 * self.trainable)


def forecast(run: Run) -> Forecast | None:
    """Work out one run's own stage from its settings; None where its method does not say what it costs.

    Raises:
        ConfigError: The settings do not fit the backbone or the budget.
    """
    method = run.method
    cost = method.cost(run) if isinstance(method, Method) else None
    if cost is None or not isinstance(method, Method):
        return None
    steps = method.steps(run)
    tokens = steps * run.train.batch_size * run.train.sequence_length
    return Forecast(
        steps=steps,
        tokens=tokens,
        flops=tokens * (cost.flops.total + method.anchoring_flops(run)),
        total=cost.total,
        trainable=cost.trainable,
        added=cost.added,
        active=cost.active,
    )


def count_flops(run: Run, model: nn.Module) -> float:
    """Return the operations that training takes per token, counted by torch on one row of the model as it trains.

    Where nothing trains it is none.

    What the backbone's own predictions take, where the model is held to them, is added by its formula.

    The state of random numbers is as it was afterwards.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return 0.0
    device = next(model.parameters()).device
    row = torch.zeros(1, run.train.sequence_length, dtype=torch.long, device=device)
    was_training = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws
        found = count_step_flops(model.train(), row, autocast(choose_precision(run.train, model), device)).total
    model.train(was_training)
    return found + (run.method.anchoring_flops(run) if isinstance(run.method, Method) else 0.0)


def count_step_flops(model: nn.Module, rows: Tensor, context: AbstractContextManager[Any]) -> Flops:
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
        with context, force_even_load(model):
            states = compute_hidden_states(model, rows)
        forward = counter.total
        if states.requires_grad:
            torch.autograd.backward(states, torch.ones_like(states))
    model.zero_grad(set_to_none=True)
    weight, passes = output_head(model), states.requires_grad
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
        self.formulas = FlopCounterMode(display=False, custom_mapping=count_attention()).flop_registry

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


def count_attention() -> dict[Any, Any]:
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
