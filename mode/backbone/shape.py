"""The shape of a backbone as numbers: parameters and operations of its layers, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from mode.backbone.load import locate
from mode.backbone.random_weights import make_config
from mode.backbone.structure import find_layer_stack
from mode.config.backbone import Backbone
from mode.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

OUTPUTS = ("o_proj", "dense", "c_proj", "down_proj", "dense_4h_to_h")
"""Matrices that lead out of attention or out of the feed-forward part; the others lead into it."""


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
        skips: Whether tokens that do not keep its output can be left out of it (`mode.modular.sparse`).
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
        return count_weights(self.matrices)

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
            backward -= 2.0 * count_weights(self.stages[0])
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
        into = count_weights(self.stages[0])
        given = count_weights({path: each for path, each in self.stages[0].items() if path.rpartition(".")[2] in GIVEN})
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


def count_weights(matrices: Matrices) -> int:
    """Return the weights of matrices.

    >>> count_weights({"q_proj": (4, 4), "k_proj": (4, 2)})
    24
    """
    return sum(inputs * outputs for inputs, outputs in matrices.values())


def divide_layers(num_layers: int, num_blocks: int) -> int:
    """Return L / B.

    Raises:
        ConfigError: B does not divide L.
    """
    per_block, rest = divmod(num_layers, num_blocks)
    if rest:
        valid = [number for number in range(1, num_layers + 1) if num_layers % number == 0]
        raise ConfigError(f"method.num_blocks={num_blocks}: {num_layers} layers divide into {valid} blocks")
    return per_block


@cache
def read_shape(backbone: Backbone) -> Shape:
    """Return the shape of a backbone, from its configuration alone.

    Raises:
        ConfigError: The backbone cannot be had.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if backbone.random is not None:  # a plan of a large one draws no weights
        settings = make_config(backbone.random)
    else:
        settings = AutoConfig.from_pretrained(locate(backbone), trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    trunk, name = find_layer_stack(model)
    config = model.config.get_text_config()
    return Shape(
        layers=tuple(read_layer_shape(layer, config) for layer in getattr(trunk, name)),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def read_layer_shape(layer: nn.Module, config: Any) -> Layer:
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


def matches_name(path: str, name: str) -> bool:
    """Say whether a module goes by a name: its whole path, or the end of it.

    >>> matches_name("self_attn.q_proj", "q_proj"), matches_name("self_attn.q_proj", "proj")
    (True, False)
    """
    return path == name or path.endswith(f".{name}")
