"""Operations, parameters and activation memory of the branches of a run's model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mode.backbone.shape import Flops, Layer, read_shape
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.cost.modular import count_added, count_gate_weights, list_block_layers
from mode.methods.base import Method
from mode.methods.mode import MoDE

HALF, WHOLE = 2, 4
"""Bytes of an element in bf16 and in fp32."""


@dataclass(frozen=True)
class Branch:
    """A sequence of layers.

    Attributes:
        flops: Operations per token.
        weights: Number of parameters.
        trained: Number of trainable parameters.
        layers: Number of layers. FSDP gathers each layer separately.
        kept: Bytes of activations that are kept per token for the backward pass.
    """

    flops: Flops
    weights: int
    trained: int
    layers: int
    kept: float

    def __add__(self, other: Branch) -> Branch:
        """Return both branches as one, as if on the same devices."""
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
        blocks: Branches of every block. The backbone's is the first.
        head: Parts outside the decoder layers: head, embeddings and gates.
        hidden: Size of a hidden state, d.
        tokens: Number of tokens of a step, G.
        half: Bytes of one weight, or of one element of a hidden state, on the link, s.
    """

    blocks: tuple[tuple[Branch, ...], ...]
    head: Branch
    hidden: int
    tokens: int
    half: int = HALF

    @property
    def whole(self) -> Branch:
        """All branches and the head as one branch."""
        return sum((branch for block in self.blocks for branch in block), start=self.head)


def describe_work(run: Run) -> Work:
    """Return the work of one step of a run, without the earlier stages of its method.

    Raises:
        ConfigError: The method has no closed form of its cost.
    """
    method, shape, length = run.method, read_shape(run.backbone), run.train.sequence_length
    tokens = run.train.batch.size * length
    outside = shape.parameters - sum(layer.parameters for layer in shape.layers)
    if isinstance(method, MoDE):
        blocks, count, (shared, chosen) = [], method.count(run), method.kept_shares(run)
        gates = count_added(shape, count, method.num_blocks, method.expert_layers, 0, method.gate.hidden)[1]
        gate = 2.0 * count_gate_weights(shape.hidden, count, method.gate.hidden)
        mixing = Flops(method.num_blocks * gate, (2 * method.num_blocks - 1) * gate)
        head = Branch(shape.head(trains=False) + mixing, outside + gates, gates, 1, 0.0)
        for number, (block, expert) in enumerate(list_block_layers(shape, method.num_blocks, method.expert_layers)):
            trains, later = method.train_experts, number > 0
            backbone = stack_branches(block, length, shared, trains=False, upstream=later)
            blocks.append((backbone, *[stack_branches(expert, length, chosen, trains=trains, upstream=later)] * count))
        return Work(tuple(blocks), head, shape.hidden, tokens)
    cost = method.cost(run) if isinstance(method, Method) else None
    if cost is None:
        raise ConfigError(
            f"method {type(method).__name__} has no closed form of its cost (`cost`), so a step cannot be planned"
        )
    trains = cost.trainable == cost.total
    kept = sum(
        count_activations(layer, trains=trains, upstream=number > 0 or trains)
        for number, layer in enumerate(shape.layers)
    )
    head = Branch(Flops(), outside, trains * outside, 1, 0.0)  # the operations of the head are part of `cost.flops`
    model = Branch(cost.flops, cost.total - outside, cost.trainable - head.trained, len(shape.layers), kept)
    return Work(((model,),), head, shape.hidden, tokens)


def stack_branches(layers: list[Layer], length: int, share: float, *, trains: bool, upstream: bool) -> Branch:
    """Return layers as one branch; only a share of the tokens runs through the last layer."""
    branch = IDLE
    for number, layer in enumerate(layers, 1):
        kept = count_activations(layer, trains=trains, upstream=upstream)
        weights, tokens = layer.parameters, share if number == len(layers) else 1.0
        flops = layer.flops_of_some(length, tokens, trains=trains, upstream=upstream)
        branch += Branch(flops, weights, trains * weights, 1, kept)
        upstream = upstream or trains
    return branch


def count_activations(layer: Layer, *, trains: bool, upstream: bool) -> float:
    """Return the bytes of activations that a layer keeps per token for the backward pass, in bf16.

    Both norms keep their inputs. Attention keeps its inputs and outputs. The feed-forward part keeps the inputs of its
    activation function and of its product. Inputs of matrices are kept if the matrices train.

    Args:
        layer: Shape of the layer.
        trains: Whether the weights of the layer train.
        upstream: Whether earlier weights train, so that gradients flow through the layer.
    """
    if not (trains or upstream):
        return 0.0
    outputs = [sum(out for _, out in stage.values()) for stage in layer.stages]
    inputs = [max((read for read, _ in stage.values()), default=0) for stage in layer.stages]
    elements = inputs[0] + outputs[0] + layer.width + inputs[2] + outputs[2]
    return float(HALF * (elements + trains * (inputs[0] + inputs[2] + inputs[3])))


def scale_tokens(work: Work, tokens: int) -> Work:
    """Return the same work for a step with another number of tokens."""
    return replace(work, tokens=tokens)
