"""Closed forms of the parameters and operations of a modular model."""

from __future__ import annotations

from collections.abc import Sequence

from mode.backbone.shape import Flops, Layer, Shape, divide_layers
from mode.cost.flops import add_flops

WORTH = 0.75
"""Largest share of tokens for which a sparse layer is faster than a layer on all tokens, as measured on a CPU."""


def block_layers(shape: Shape, num_blocks: int, expert_layers: int) -> list[tuple[list[Layer], list[Layer]]]:
    """Return the layers of every block of a modular model: the layers of the backbone and the layers of one expert.

    Args:
        shape: Shape of the backbone.
        num_blocks: Number of blocks, B.
        expert_layers: Layers of an expert in a block, l.

    Raises:
        ConfigError: B does not divide the number of layers.
    """
    per_block = divide_layers(len(shape.layers), num_blocks)
    blocks = []
    for start in range(0, len(shape.layers), per_block):
        block = list(shape.layers[start : start + per_block])
        blocks.append((block, [block[number % per_block] for number in range(expert_layers)]))
    return blocks


def count_gate_weights(hidden: int, num_experts: int, width: int) -> int:
    """Return the number of weights in a gate, without biases.

    Args:
        hidden: Hidden size of the decoder, d.
        num_experts: N.
        width: Size of the gate's hidden layer; 0 for a gate without a hidden layer.
    """
    return width * (hidden + num_experts + 1) if width else hidden * (num_experts + 1)


def count_added(
    shape: Shape, count: int, num_blocks: int, depth: int, rank: int = 0, width: int = 0
) -> tuple[int, int]:
    """Return the number of parameters that a modular model adds to its backbone: of the experts, and of the gates.

    Args:
        shape: Shape of the backbone.
        count: Number of experts, N.
        num_blocks: Number of blocks, B.
        depth: Layers of an expert in a block, l.
        rank: Rank of an expert's change of the head; 0 for a head without experts.
        width: Size of a gate's hidden layer; 0 for gates without a hidden layer.

    Raises:
        ConfigError: B does not divide the number of layers.
    """
    expert = sum(layer.parameters for _, layers in block_layers(shape, num_blocks, depth) for layer in layers)
    expert += rank * (shape.hidden + shape.vocabulary)
    gate = count_gate_weights(shape.hidden, count, width) + width + count + 1
    return count * expert, (num_blocks + bool(rank)) * gate


def compute_branch_flops(layers: Sequence[Layer], length: int, share: float, *, trains: bool, upstream: bool) -> Flops:
    """Return the operations of a branch per token of the row, if only a share of the tokens keeps the branch.

    The last layer leaves out the other tokens. The layers before it run on all tokens.

    Args:
        layers: Layers of the branch.
        length: Tokens per row, S.
        share: Share of the tokens that keep the branch.
        trains: Whether the branch trains.
        upstream: Whether parameters before the branch train.
    """
    shares = [1.0] * (len(layers) - 1) + [share]
    return add_flops(
        layer.flops_of_some(length, part, trains=trains, upstream=upstream or (trains and number > 0))
        for number, (layer, part) in enumerate(zip(layers, shares, strict=True))
    )
