"""What the branches of a stage take, in operations and memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mode.backbone.shape import Flops, Layer, read_shape
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.cost.modular import block_layers, count_added, count_gate_weights
from mode.methods.base import Method
from mode.methods.mode import MoDE

HALF, WHOLE = 2, 4
"""Bytes of a number in bf16 and in fp32."""


@dataclass(frozen=True)
class Branch:
    """Layers that run one after the other.

    Attributes:
        flops: Per token.
        weights: Their parameters.
        trained: Those that train.
        layers: Their number: each is gathered by itself.
        kept: Bytes of activations that a token leaves for the backward pass.
    """

    flops: Flops
    weights: int
    trained: int
    layers: int
    kept: float

    def __add__(self, other: Branch) -> Branch:
        """Put two branches on the same devices."""
        return Branch(
            self.flops + other.flops,
            self.weights + other.weights,
            self.trained + other.trained,
            self.layers + other.layers,
            self.kept + other.kept,
        )


IDLE = Branch(Flops(), 0, 0, 0, 0.0)


@dataclass(frozen=True)
class Work:
    """A training step: by block its branches, the backbone's first; and the head with the embeddings.

    Attributes:
        blocks: The branches of every block.
        head: What is outside the layers: head, embeddings, gates.
        hidden: Size of a hidden state, d.
        tokens: Tokens of a step, G.
        half: Bytes in which weights and hidden states are sent, s.
    """

    blocks: tuple[tuple[Branch, ...], ...]
    head: Branch
    hidden: int
    tokens: int
    half: int = HALF

    @property
    def whole(self) -> Branch:
        """Everything on one device."""
        return sum((branch for block in self.blocks for branch in block), start=self.head)


def describe_work(run: Run) -> Work:
    """Return the step of a run's own stage.

    Raises:
        ConfigError: Its method does not say what it takes.
    """
    method, shape, length = run.method, read_shape(run.backbone), run.train.sequence_length
    tokens = run.train.batch.size * length
    outside = shape.parameters - sum(layer.parameters for layer in shape.layers)
    if isinstance(method, MoDE):
        found, count, (shared, chosen) = [], method.count(run), method.kept_shares(run)
        gates = count_added(shape, count, method.num_blocks, method.expert_layers, 0, method.gate.hidden)[1]
        gate = 2.0 * count_gate_weights(shape.hidden, count, method.gate.hidden)
        mixing = Flops(method.num_blocks * gate, (2 * method.num_blocks - 1) * gate)
        head = Branch(shape.head(trains=False) + mixing, outside + gates, gates, 1, 0.0)
        for number, (block, expert) in enumerate(block_layers(shape, method.num_blocks, method.expert_layers)):
            trains, later = method.train_experts, number > 0
            backbone = stack_branches(block, length, shared, trains=False, upstream=later)
            found.append((backbone, *[stack_branches(expert, length, chosen, trains=trains, upstream=later)] * count))
        return Work(tuple(found), head, shape.hidden, tokens)
    cost = method.cost(run) if isinstance(method, Method) else None
    if cost is None:
        raise ConfigError(
            f"method {type(method).__name__} does not say what it takes (`cost`), so it cannot be planned"
        )
    trains = cost.trainable == cost.total
    kept = sum(
        count_activations(layer, trains=trains, upstream=number > 0 or trains)
        for number, layer in enumerate(shape.layers)
    )
    head = Branch(Flops(), outside, trains * outside, 1, 0.0)  # its operations are among the layers'
    one = Branch(cost.flops, cost.total - outside, cost.trainable - head.trained, len(shape.layers), kept)
    return Work(((one,),), head, shape.hidden, tokens)


def stack_branches(layers: list[Layer], length: int, share: float, *, trains: bool, upstream: bool) -> Branch:
    """Return layers as a branch, on whose last a share of tokens run."""
    found = IDLE
    for number, layer in enumerate(layers, 1):
        kept = count_activations(layer, trains=trains, upstream=upstream)
        weights, some = layer.parameters, share if number == len(layers) else 1.0
        flops = layer.flops_of_some(length, some, trains=trains, upstream=upstream)
        found += Branch(flops, weights, trains * weights, 1, kept)
        upstream = upstream or trains
    return found


def count_activations(layer: Layer, *, trains: bool, upstream: bool) -> float:
    """Return the bytes that a token leaves in a layer for its backward pass, in bf16.

    Both norms keep their input, attention what it reads and says, the feed-forward part what its gate and its product
    read; the inputs of matrices are kept where these train.
    """
    if not (trains or upstream):
        return 0.0
    outputs = [sum(out for _, out in stage.values()) for stage in layer.stages]
    inputs = [max((read for read, _ in stage.values()), default=0) for stage in layer.stages]
    numbers = inputs[0] + outputs[0] + layer.width + inputs[2] + outputs[2]
    return float(HALF * (numbers + trains * (inputs[0] + inputs[2] + inputs[3])))


def scale_tokens(work: Work, tokens: int) -> Work:
    """Return a step of another number of tokens."""
    return replace(work, tokens=tokens)
