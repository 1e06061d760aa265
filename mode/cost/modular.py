"""Closed forms of the parameters and operations of a modular model."""

from __future__ import annotations

from collections.abc import Sequence

from mode.backbone.shape import Flops, Layer, Shape, divide_layers
from mode.config.train import Train
from mode.cost.flops import Cost, add_flops

WORTH = 0.75
"""Largest share of tokens for which a sparse layer is faster than a layer on all tokens, as measured on a CPU."""


def list_block_layers(shape: Shape, num_blocks: int, expert_layers: int) -> list[tuple[list[Layer], list[Layer]]]:
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
    expert = sum(layer.parameters for _, layers in list_block_layers(shape, num_blocks, depth) for layer in layers)
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


def modular_cost(
    shape: Shape,
    length: int,
    *,
    num_experts: int,
    num_blocks: int,
    expert_layers: int,
    head_rank: int = 0,
    gate_hidden: int = 0,
    top_k: int | None = None,
    shares: tuple[float, float] = (1.0, 1.0),
    experts_train: bool = True,
) -> Cost:
    """Return what it costs to train experts and gates beside a frozen decoder.

    In block 1 no gradient passes through frozen layers.

    Args:
        shape: Of the decoder.
        length: Tokens of a row, S.
        num_experts: N.
        num_blocks: B.
        expert_layers: l.
        head_rank: r, rank of every expert's change of the head; 0 for none.
        gate_hidden: Width of a gate's hidden layer; 0 for none.
        top_k: Branches that a token keeps; None for all.
        shares: Shares of tokens that the last layers of the backbone's and of an expert's branch run on.
        experts_train: Whether the experts train, or the gates alone.

    Raises:
        ConfigError: B does not divide L.
    """
    changed = num_experts * head_rank
    shared, chosen = shares
    gate = 2.0 * count_gate_weights(shape.hidden, num_experts, gate_hidden)
    parts, idle = [shape.head(trains=bool(changed) and experts_train, extra=changed)], 0
    if changed:
        down = 2.0 * shape.hidden * changed
        parts += [Flops(down, down * (1 + experts_train)), Flops(gate, 2.0 * gate)]
    for number, (block, expert) in enumerate(list_block_layers(shape, num_blocks, expert_layers)):
        later = number > 0
        parts.append(compute_branch_flops(block, length, shared, trains=False, upstream=later))
        parts += [compute_branch_flops(expert, length, chosen, trains=experts_train, upstream=later)] * num_experts
        parts.append(Flops(gate, gate * (1 + later)))
        sizes = [sum(layer.parameters for layer in layers) for layers in (block, *[expert] * num_experts)]
        idle += sum(sorted(sizes)[:-top_k]) if top_k else 0
    experts, gates = count_added(shape, num_experts, num_blocks, expert_layers, head_rank, gate_hidden)
    total = shape.parameters + experts + gates
    return Cost(
        flops=add_flops(parts),
        total=total,
        trainable=gates + (experts if experts_train else 0),
        added=experts + gates,
        active=total - idle,
    )


def estimate_kept_shares(
    train: Train, *, num_branches: int, top_k: int | None, reads_output: bool, experts_train: bool
) -> tuple[float, float]:
    """Return the shares of tokens that the last layers of the backbone's and of an expert's branch run on.

    The load is taken to be even. Both shares are 1 where the settings of the loop run every branch whole.

    Args:
        train: Settings of the loop.
        num_branches: N + 1.
        top_k: Branches that a token keeps; None for all.
        reads_output: Whether the gates read the output of the backbone's branch, which then runs whole.
        experts_train: Whether the experts train.
    """
    share = min(top_k or num_branches, num_branches) / num_branches
    recomputed = train.memory.activation_checkpointing
    plain = train.kernels.branch_execution == "loop" and train.kernels.attention == "sdpa"
    if share > WORTH or train.kernels.cuda_graph or not plain or train.parallelism.strategy in ("fsdp", "tp"):
        return 1.0, 1.0
    if recomputed in ("all", "auto") or (recomputed == "frozen" and not experts_train):
        return 1.0, 1.0
    return 1.0 if recomputed == "frozen" or reads_output else share, share
