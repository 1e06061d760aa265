"""What training costs, worked out before it begins: floating-point operations by closed form, and parameters.

Per token of a row of S tokens, a layer with P weights in its matrices and attention of width a takes

    forward                          2 P + A, with A = 4 S a: scores and values of all S positions, masked or not
    backward, weights train          4 P + 2.5 A: gradients of weights and inputs; attention computes its scores again
    backward, weights are frozen     2 P + 2.5 A: gradients of inputs alone
    backward, nothing before trains  0

Of a layer whose output a share s of tokens keeps (`mode.sparse`) the others run the matrices into attention, P_in, and
gradients go through those of keys and values, P_kv, as far as they are of their own:

    forward                          2 P_in + s (2 P + A)
    backward, weights train          4 P_kv + s (4 (P - P_kv) + 2.5 A); half the first terms where weights are frozen

Attention that is not fused (Gemma 2's, or with dropout) keeps its scores and takes 2 A backward. Where nothing before a
layer trains that has no norm at its input (OLMo 2), its matrices into attention pass no gradient on. The head, with d
inputs and V outputs, takes 2 d V forward, and as much again for its inputs and for its weights. Norms, embeddings and
element-wise work are left out, as torch's own counter leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from typing import TYPE_CHECKING, Any

from mode.backbone import locate, stack
from mode.checked import ConfigError
from mode.random_weights import architecture
from mode.settings import Backbone

if TYPE_CHECKING:
    from torch import nn

OUTPUTS = ("o_proj", "dense", "c_proj", "down_proj", "dense_4h_to_h")
"""Matrices that lead out of attention or out of the feed-forward part; the others lead into it."""

WORTH = 0.75
"""Share of tokens up to which it takes less time to leave the others out of a layer (measured on a processor)."""

WHOLE_LAYERS = ("gpt_neox", "gpt2")
"""Families whose layers run on all tokens: their decoders do not tell them by name what they are given."""

GIVEN = ("k_proj", "v_proj")
"""Matrices of keys and values."""

Matrices = Mapping[str, tuple[int, int]]
"""Inputs and outputs of matrices, by their path in a layer."""


ATTENTION = ("self_attn.", "attention.", "attn.")
"""What the paths of attention begin with in the layers of the supported families."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token.

    Attributes:
        forward: Of the forward pass.
        backward: Of the backward pass.
    """

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        """Add what two parts take."""
        return Flops(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> float:
        """Of both passes."""
        return self.forward + self.backward


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


@dataclass(frozen=True)
class Layer:
    """Shape of a decoder layer.

    Attributes:
        stages: Its matrices in the order of the data: into attention, out of it, into the feed-forward part, out of it.
        width: Width of attention, heads times their size.
        parameters: All its parameters.
        feed_forward: Parameters of its feed-forward part.
        attending: Parameters of its attention.
        parallel: Whether attention and the feed-forward part both read the layer's input.
        fused: Whether attention computes its scores again in the backward pass.
        normed: Whether a norm comes before attention.
        skips: Whether tokens that do not keep its output can be left out of it (`mode.sparse`).
    """

    stages: tuple[Matrices, Matrices, Matrices, Matrices]
    width: int
    parameters: int
    feed_forward: int
    attending: int
    parallel: bool
    fused: bool
    normed: bool
    skips: bool

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """All its matrices, in the order of the data."""
        return {path: size for stage in self.stages for path, size in stage.items()}

    @property
    def weights(self) -> int:
        """Weights of all its matrices, P."""
        return size(self.matrices)

    def attention(self, length: int, *, passes: bool = True) -> Flops:
        """Return what attention takes per token; `passes`: whether gradients go through it."""
        forward = 4.0 * length * self.width
        return Flops(forward, passes * (2.5 if self.fused else 2.0) * forward)

    def flops(self, length: int, *, trains: bool, upstream: bool = True) -> Flops:
        """Return what the layer takes per token.

        Args:
            length: Tokens of a row, S.
            trains: Whether its weights train.
            upstream: Whether something before the layer trains, so that gradients go on through it.
        """
        one = 2.0 * self.weights
        backward = one * (2 if trains else int(upstream))
        if trains and not upstream and not self.normed:
            backward -= 2.0 * size(self.stages[0])
        return Flops(one, backward) + self.attention(length, passes=trains or upstream)

    def flops_of_some(self, length: int, share: float, *, trains: bool, upstream: bool = True) -> Flops:
        """Return what the layer takes per token of all, where a share of them keeps its output.

        Args:
            length: Tokens of a row, S.
            share: Those of them that keep it, s.
            trains: Whether its weights train.
            upstream: Whether something before the layer trains.
        """
        if share == 1.0 or not self.skips:
            return self.flops(length, trains=trains, upstream=upstream)
        into = size(self.stages[0])
        given = size({path: each for path, each in self.stages[0].items() if path.rpartition(".")[2] in GIVEN})
        rest = (
            self.weights - given
        )  # where keys and values come out of one matrix with queries, gradients go through it
        given = given or into
        backward = 2.0 * (trains + (trains or upstream)) * (given + share * rest)
        if trains and not upstream and not self.normed:
            backward -= 2.0 * (given + share * (rest - self.weights + into))
        attention = self.attention(length, passes=trains or upstream)
        forward = 2.0 * into + share * (2.0 * self.weights + attention.forward)
        return Flops(forward, backward + share * attention.backward)


@dataclass(frozen=True)
class Shape:
    """Shape of a decoder.

    Attributes:
        layers: Its layers.
        hidden: Size of a hidden state, d.
        vocabulary: Outputs of the head, V.
        parameters: All its parameters; tied ones count once.
    """

    layers: tuple[Layer, ...]
    hidden: int
    vocabulary: int
    parameters: int

    def head(self, *, trains: bool, upstream: bool = True, extra: int = 0) -> Flops:
        """Return what the head takes per token, with some columns more than there are hidden dimensions."""
        one = 2.0 * (self.hidden + extra) * self.vocabulary
        return Flops(one, one * (int(upstream) + int(trains)))


def size(matrices: Matrices) -> int:
    """Return the weights of matrices.

    >>> size({"q_proj": (4, 4), "k_proj": (4, 2)})
    24
    """
    return sum(inputs * outputs for inputs, outputs in matrices.values())


def add(parts: Iterable[Flops]) -> Flops:
    """Add up what parts take.

    >>> add([Flops(1.0, 2.0), Flops(3.0, 4.0)])
    Flops(forward=4.0, backward=6.0)
    """
    return reduce(Flops.__add__, parts, Flops())


def full(shape: Shape, length: int) -> Cost:
    """Return what it costs to train every parameter of a decoder on rows of `length` tokens."""
    flops = add(layer.flops(length, trains=True) for layer in shape.layers) + shape.head(trains=True)
    size = shape.parameters
    return Cost(flops=flops, total=size, trainable=size, added=0, active=size)


def mixture(
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
        feed_forward = size(layer.stages[2]) + size(layer.stages[3])
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
        flops=add(parts),
        total=total,
        trainable=total - (0 if experts_train else num_experts * expert_sizes),
        added=added,
        active=total - idle,
    )


def untouched(shape: Shape, length: int) -> Cost:
    """Return what a decoder costs that is not trained at all."""
    flops = add(layer.flops(length, trains=False, upstream=False) for layer in shape.layers)
    flops += shape.head(trains=False, upstream=False)
    return Cost(flops=flops, total=shape.parameters, trainable=0, added=0, active=shape.parameters)


def layers_per_block(num_layers: int, num_blocks: int) -> int:
    """Return L / B.

    Raises:
        ConfigError: B does not divide L.
    """
    per_block, rest = divmod(num_layers, num_blocks)
    if rest:
        valid = [number for number in range(1, num_layers + 1) if num_layers % number == 0]
        raise ConfigError(f"method.num_blocks={num_blocks}: {num_layers} layers divide into {valid} blocks")
    return per_block


def blocks(shape: Shape, num_blocks: int, expert_layers: int) -> list[tuple[list[Layer], list[Layer]]]:
    """Return the layers of every block of a modular model: the backbone's, and those of one expert.

    Raises:
        ConfigError: B does not divide L.
    """
    per_block = layers_per_block(len(shape.layers), num_blocks)
    found = []
    for start in range(0, len(shape.layers), per_block):
        block = list(shape.layers[start : start + per_block])
        found.append((block, [block[number % per_block] for number in range(expert_layers)]))
    return found


def gate_size(hidden: int, num_experts: int, width: int) -> int:
    """Return the weights of a gate, without its biases: of a linear map, or of two around a hidden layer of `width`."""
    return width * (hidden + num_experts + 1) if width else hidden * (num_experts + 1)


def beside(shape: Shape, count: int, num_blocks: int, depth: int, rank: int = 0, width: int = 0) -> tuple[int, int]:
    """Return the parameters beside a modular model's backbone: those of N experts of l layers a block, and the gates'.

    Raises:
        ConfigError: B does not divide L.
    """
    expert = sum(layer.parameters for _, layers in blocks(shape, num_blocks, depth) for layer in layers)
    expert += rank * (shape.hidden + shape.vocabulary)
    gate = gate_size(shape.hidden, count, width) + width + count + 1
    return count * expert, (num_blocks + bool(rank)) * gate


@cache
def shape_of(backbone: Backbone) -> Shape:
    """Return the shape of a backbone, from its configuration alone.

    Raises:
        ConfigError: The backbone cannot be had.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if backbone.random is not None:  # a plan of a large one draws no weights
        settings = architecture(backbone.random)
    else:
        settings = AutoConfig.from_pretrained(locate(backbone), trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    trunk, name = stack(model)
    config = model.config.get_text_config()
    return Shape(
        layers=tuple(layer_shape(layer, config) for layer in getattr(trunk, name)),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def layer_shape(layer: nn.Module, config: Any) -> Layer:
    """Return the shape of a decoder layer."""
    stages: tuple[dict[str, tuple[int, int]], ...] = ({}, {}, {}, {})
    for path, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2:
            continue
        inputs, outputs = weight.shape if type(module).__name__ == "Conv1D" else reversed(weight.shape)
        attends = "att" in path.partition(".")[0]
        stages[2 * (not attends) + (path.rpartition(".")[2] in OUTPUTS)][path] = (inputs, outputs)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dropout = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)
    return Layer(
        stages=(stages[0], stages[1], stages[2], stages[3]),
        width=config.num_attention_heads * width,
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
        feed_forward=sum(value.numel() for name, value in layer.named_parameters() if name.startswith("mlp.")),
        attending=sum(value.numel() for name, value in layer.named_parameters() if name.startswith(ATTENTION)),
        parallel=bool(getattr(config, "use_parallel_residual", False)),
        fused=config._attn_implementation != "eager" and not dropout,
        normed=any(hasattr(layer, name) for name in ("input_layernorm", "ln_1")),
        skips=config.model_type not in WHOLE_LAYERS,
    )


def is_named(path: str, name: str) -> bool:
    """Say whether a module goes by a name: its whole path, or the end of it.

    >>> is_named("self_attn.q_proj", "q_proj"), is_named("self_attn.q_proj", "proj")
    (True, False)
    """
    return path == name or path.endswith(f".{name}")
