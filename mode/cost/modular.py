"""Closed form of what a MoDE stage takes."""

from __future__ import annotations

from collections.abc import Sequence

from mode.backbone.shape import Flops, Layer, Shape, divide_layers
from mode.cost.flops import add_flops

WORTH = 0.75
"""Share of tokens up to which it takes less time to leave the others out of a layer (measured on a processor)."""


def block_layers(shape: Shape, num_blocks: int, expert_layers: int) -> list[tuple[list[Layer], list[Layer]]]:
    """Return the layers of every block of a modular model: the backbone's, and those of one expert.

    Raises:
        ConfigError: B does not divide L.
    """
    per_block = divide_layers(len(shape.layers), num_blocks)
    found = []
    for start in range(0, len(shape.layers), per_block):
        block = list(shape.layers[start : start + per_block])
        found.append((block, [block[number % per_block] for number in range(expert_layers)]))
    return found


def count_gate_weights(hidden: int, num_experts: int, width: int) -> int:
    """Return the weights of a gate, without its biases: of a linear map, or of two around a hidden layer of `width`."""
    return width * (hidden + num_experts + 1) if width else hidden * (num_experts + 1)


def count_added(
    shape: Shape, count: int, num_blocks: int, depth: int, rank: int = 0, width: int = 0
) -> tuple[int, int]:
    """Return the parameters beside a modular model's backbone: those of N experts of l layers a block, and the gates'.

    Raises:
        ConfigError: B does not divide L.
    """
    expert = sum(layer.parameters for _, layers in block_layers(shape, num_blocks, depth) for layer in layers)
    expert += rank * (shape.hidden + shape.vocabulary)
    gate = count_gate_weights(shape.hidden, count, width) + width + count + 1
    return count * expert, (num_blocks + bool(rank)) * gate


def compute_branch_flops(layers: Sequence[Layer], length: int, share: float, *, trains: bool, upstream: bool) -> Flops:
    """Return what a branch takes per token where a share of them keeps it: the last layer leaves the others out."""
    shares = [1.0] * (len(layers) - 1) + [share]
    return add_flops(
        layer.flops_of_some(length, each, trains=trains, upstream=upstream or (trains and number > 0))
        for number, (layer, each) in enumerate(zip(layers, shares, strict=True))
    )
