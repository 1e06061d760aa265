"""What training costs, worked out before it begins: floating-point operations by closed form, and parameters.

Per token of a row of S tokens, a layer with P weights in its matrices and attention of width a takes

    forward                          2 P + A, with A = 4 S a: scores and values of all S positions, masked or not
    backward, weights train          4 P + 2.5 A: gradients of weights and inputs; attention computes its scores again
    backward, weights are frozen     2 P + 2.5 A: gradients of inputs alone
    backward, nothing before trains  0

Of a layer whose output a share s of tokens keeps (`mode.modular.sparse`), the others run the matrices into attention,
P_in, and gradients go through those of keys and values, P_kv, as far as they are of their own:

    forward                          2 P_in + s (2 P + A)
    backward, weights train          4 P_kv + s (4 (P - P_kv) + 2.5 A); half the first terms where weights are frozen

Attention that is not fused (Gemma 2's, or with dropout) keeps its scores and takes 2 A backward. Where nothing before a
layer trains that has no norm at its input (OLMo 2), its matrices into attention pass no gradient on. The head, with d
inputs and V outputs, takes 2 d V forward, and as much again for its inputs and for its weights. Norms, embeddings and
element-wise work are left out, as torch's own counter leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from mode.backbone.shape import Flops, Shape, count_weights


@dataclass(frozen=True)
class Cost:
    """What a method's model costs to train.

    Attributes:
        flops: Per token of training.
        total: Parameters of the model.
        trainable: Parameters that train.
        added: Parameters beside the backbone's.
        active: Most parameters that a token's prediction can depend on.
    """

    flops: Flops
    total: int
    trainable: int
    added: int
    active: int


def add_flops(parts: Iterable[Flops]) -> Flops:
    """Add up what parts take.

    >>> add_flops([Flops(1.0, 2.0), Flops(3.0, 4.0)])
    Flops(forward=4.0, backward=6.0)
    """
    return reduce(Flops.__add__, parts, Flops())


def full_cost(shape: Shape, length: int) -> Cost:
    """Return what it costs to train every parameter of a decoder on rows of `length` tokens."""
    flops = add_flops(layer.flops(length, trains=True) for layer in shape.layers) + shape.head(trains=True)
    size = shape.parameters
    return Cost(flops=flops, total=size, trainable=size, added=0, active=size)


def mixture_cost(
    shape: Shape,
    length: int,
    num_experts: int,
    top_k: int | None,
    *,
    experts_train: bool = True,
    attentions: int = 1,
    soft_layers: int = 0,
) -> Cost:
    """Return what it costs to train a decoder whose feed-forward parts are N experts, of which a token has k.

    Args:
        shape: Of the dense model.
        length: Tokens of a row, S.
        num_experts: N.
        top_k: k; None where all run.
        experts_train: Whether the experts train, as all else does.
        attentions: Attention layers side by side in every layer, with a router where there are several; all run.
        soft_layers: First layers in which all experts run.
    """
    chosen = min(top_k or num_experts, num_experts)
    routers = num_experts + (attentions if attentions > 1 else 0)
    parts, expert_sizes, others, idle = [shape.head(trains=True)], 0, 0, 0
    for number, layer in enumerate(shape.layers):
        active = num_experts if number < soft_layers else chosen
        feed_forward = count_weights(layer.stages[2]) + count_weights(layer.stages[3])
        one, wide = 2.0 * attentions * (layer.weights - feed_forward), 2.0 * feed_forward * active
        router = 2.0 * shape.hidden * routers
        parts += [Flops(one, 2 * one), Flops(wide, (1 + experts_train) * wide), Flops(router, 2 * router)]
        parts += [layer.attention(length)] * attentions
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


def untouched_cost(shape: Shape, length: int) -> Cost:
    """Return what a decoder costs that is not trained at all."""
    flops = add_flops(layer.flops(length, trains=False, upstream=False) for layer in shape.layers)
    flops += shape.head(trains=False, upstream=False)
    return Cost(flops=flops, total=shape.parameters, trainable=0, added=0, active=shape.parameters)
