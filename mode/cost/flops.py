"""Closed-form cost of training: parameters and floating-point operations, computed before a run starts.

A layer has P weights in its matrices and attention of width a. Its operations per token of a row of S tokens are

    forward                        2 P + A, with A = 4 S a for scores and values of all S positions, masked or not
    backward, trainable weights    4 P + 2.5 A: gradients of weights and inputs, recomputed attention scores
    backward, frozen weights       2 P + 2.5 A: gradients of inputs only; 0 if nothing before the layer trains

In a sparse layer only a share s of the tokens keeps the output (`mode.modular.sparse`). The input matrices of
attention, with P_in weights, run on all tokens. The matrices of keys and values, with P_kv weights, pass gradients for
all tokens. If queries, keys and values share one matrix, P_kv is P_in in the first backward term and 0 in the second.

    forward                        2 P_in + s (2 P + A)
    backward, trainable weights    4 P_kv + s (4 (P - P_kv) + 2.5 A)
    backward, frozen weights       2 P_kv + s (2 (P - P_kv) + 2.5 A)

Attention that is not fused (Gemma 2, or with dropout) stores its scores and takes 2 A in the backward pass. If nothing
trains before a layer without a norm at its input (OLMo 2), the gradient of the layer's input is not computed. The head,
with d inputs and V outputs, takes 2 d V operations forward, 2 d V for the gradient of its inputs and 2 d V for that of
its weights. Norms, embeddings and element-wise operations are not counted, as in torch's own counter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from mode.backbone.shape import Flops, Shape, count_weights


@dataclass(frozen=True)
class Cost:
    """Cost of training a method's model.

    Attributes:
        flops: Operations per token of training.
        total: Number of all parameters.
        trainable: Number of trainable parameters.
        added: Number of parameters added to the backbone's.
        active: Largest number of parameters that the prediction of one token uses.
    """

    flops: Flops
    total: int
    trainable: int
    added: int
    active: int


def add_flops(parts: Iterable[Flops]) -> Flops:
    """Return the sum of the operations of several parts.

    >>> add_flops([Flops(1.0, 2.0), Flops(3.0, 4.0)])
    Flops(forward=4.0, backward=6.0)
    """
    return reduce(Flops.__add__, parts, Flops())


def compute_full_cost(shape: Shape, length: int) -> Cost:
    """Return the cost of training all parameters of a decoder on rows of `length` tokens."""
    flops = add_flops(layer.flops(length, trains=True) for layer in shape.layers) + shape.head(trains=True)
    size = shape.parameters
    return Cost(flops=flops, total=size, trainable=size, added=0, active=size)


def compute_mixture_cost(
    shape: Shape,
    length: int,
    num_experts: int,
    top_k: int | None,
    *,
    experts_train: bool = True,
    attentions: int = 1,
    soft_layers: int = 0,
) -> Cost:
    """Return the cost of training a decoder whose feed-forward parts are mixtures of N experts, k of them per token.

    Args:
        shape: Shape of the dense model.
        length: Tokens per row, S.
        num_experts: N.
        top_k: k; None if all experts run.
        experts_train: Whether the experts train. All other parameters train.
        attentions: Number of attention experts per layer. All of them run; several have a router.
        soft_layers: Number of first layers in which all experts run.
    """
    chosen = min(top_k or num_experts, num_experts)
    routers = num_experts + (attentions if attentions > 1 else 0)
    parts, expert_sizes, others, idle = [shape.head(trains=True)], 0, 0, 0
    for number, layer in enumerate(shape.layers):
        active = num_experts if number < soft_layers else chosen
        feed_forward = count_weights(layer.stages[2]) + count_weights(layer.stages[3])
        attention, experts = 2.0 * attentions * (layer.weights - feed_forward), 2.0 * feed_forward * active
        router = 2.0 * shape.hidden * routers
        parts += [Flops(attention, 2 * attention), Flops(experts, (1 + experts_train) * experts)]
        parts += [Flops(router, 2 * router)] + [layer.attention(length)] * attentions
        expert_sizes += layer.feed_forward
        idle += (num_experts - active) * layer.feed_forward
        others += layer.attending
    added = (num_experts - 1) * expert_sizes + (attentions - 1) * others + len(shape.layers) * routers * shape.hidden
    total = shape.parameters + added
    return Cost(
        flops=add_flops(parts),
        total=total,
        trainable=total - (0 if experts_train else num_experts * expert_sizes),
        added=added,
        active=total - idle,
    )


def compute_untouched_cost(shape: Shape, length: int) -> Cost:
    """Return the cost of a decoder that only runs forward."""
    flops = add_flops(layer.flops(length, trains=False, upstream=False) for layer in shape.layers)
    flops += shape.head(trains=False, upstream=False)
    return Cost(flops=flops, total=shape.parameters, trainable=0, added=0, active=shape.parameters)
