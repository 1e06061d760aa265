"""The shape of a backbone: parameters and operations (FLOPs) of its layers, read from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from mode.backbone.load import read_config, reporting_load_errors
from mode.backbone.random_weights import make_config
from mode.backbone.structure import find_layer_stack
from mode.config.backbone import Backbone
from mode.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

OUTPUTS = ("o_proj", "dense", "c_proj", "down_proj", "dense_4h_to_h")
"""Names of the output matrices of attention and of the feed-forward part. All other matrices are input matrices."""


WHOLE_LAYERS = ("gpt_neox", "gpt2")
"""Families whose layers always run on all tokens, because their decoders pass arguments to layers by position."""


KEY_VALUE = ("k_proj", "v_proj")
"""Names of the matrices of keys and values."""


Matrices = Mapping[str, tuple[int, int]]
"""Number of inputs and outputs of matrices, by their path in a layer."""


ATTENTION = ("self_attn.", "attention.", "attn.")
"""Prefixes of the attention module's path in a layer, in the supported families."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token.

    Attributes:
        forward: Operations of the forward pass.
        backward: Operations of the backward pass.
    """

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        """Add the operations of two parts."""
        return Flops(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> float:
        """Operations of both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Layer:
    """Shape of a decoder layer.

    Attributes:
        stages: Matrices in the order of the data flow: input of attention, output of attention, input of the
            feed-forward part, output of the feed-forward part.
        width: Width of attention, number of heads times head size.
        parameters: Number of all parameters.
        feed_forward: Number of parameters of the feed-forward part.
        attending: Number of parameters of attention.
        parallel: Whether attention and the feed-forward part both read the layer's input.
        fused: Whether attention recomputes its scores in the backward pass.
        normed: Whether a norm precedes attention.
        skips: Whether the layer can leave out tokens that do not keep its output (`mode.modular.sparse`).
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
        """All matrices, in the order of the data flow."""
        return {path: size for stage in self.stages for path, size in stage.items()}

    @property
    def weights(self) -> int:
        """Number of weights in all matrices, P."""
        return count_weights(self.matrices)

    def attention(self, length: int, *, passes: bool = True) -> Flops:
        """Return the operations of attention per token, without its matrices.

        Args:
            length: Tokens per row, S.
            passes: Whether gradients flow through attention.
        """
        forward = 4.0 * length * self.width
        return Flops(forward, passes * (2.5 if self.fused else 2.0) * forward)

    def flops(self, length: int, *, trains: bool, upstream: bool = True) -> Flops:
        """Return the operations of the layer per token.

        Args:
            length: Tokens per row, S.
            trains: Whether the layer's weights train.
            upstream: Whether parameters before the layer train, so that the layer's input needs a gradient.
        """
        forward = 2.0 * self.weights
        backward = forward * (2 if trains else int(upstream))
        if trains and not upstream and not self.normed:
            backward -= 2.0 * count_weights(self.stages[0])
        return Flops(forward, backward) + self.attention(length, passes=trains or upstream)

    def flops_of_some(self, length: int, share: float, *, trains: bool, upstream: bool = True) -> Flops:
        """Return the operations of the layer per token of the row, if only a share of the tokens keeps its output.

        Args:
            length: Tokens per row, S.
            share: Share of the tokens that keep the output, s.
            trains: Whether the layer's weights train.
            upstream: Whether parameters before the layer train.
        """
        if share == 1.0 or not self.skips:
            return self.flops(length, trains=trains, upstream=upstream)
        inputs = self.stages[0]
        into = count_weights(inputs)
        key_value = count_weights({path: size for path, size in inputs.items() if path.rpartition(".")[2] in KEY_VALUE})
        rest = self.weights - key_value
        key_value = key_value or into  # a fused matrix of queries, keys and values passes gradients for all tokens
        backward = 2.0 * (trains + (trains or upstream)) * (key_value + share * rest)
        if trains and not upstream and not self.normed:
            backward -= 2.0 * (key_value + share * (rest - self.weights + into))
        attention = self.attention(length, passes=trains or upstream)
        forward = 2.0 * into + share * (2.0 * self.weights + attention.forward)
        return Flops(forward, backward + share * attention.backward)


@dataclass(frozen=True)
class Shape:
    """Shape of a decoder.

    Attributes:
        layers: Shapes of the layers.
        hidden: Hidden size, d.
        vocabulary: Vocabulary size, the number of outputs of the head, V.
        parameters: Number of all parameters; tied parameters count once.
    """

    layers: tuple[Layer, ...]
    hidden: int
    vocabulary: int
    parameters: int

    def head(self, *, trains: bool, upstream: bool = True, extra: int = 0) -> Flops:
        """Return the operations of the output head per token.

        Args:
            trains: Whether the head trains.
            upstream: Whether parameters before the head train.
            extra: Inputs of the head beyond the hidden size.
        """
        forward = 2.0 * (self.hidden + extra) * self.vocabulary
        return Flops(forward, forward * (int(upstream) + int(trains)))


def count_weights(matrices: Matrices) -> int:
    """Return the number of weights in matrices.

    >>> count_weights({"q_proj": (4, 4), "k_proj": (4, 2)})
    24
    """
    return sum(inputs * outputs for inputs, outputs in matrices.values())


def divide_layers(num_layers: int, num_blocks: int) -> int:
    """Return the number of layers per block, L / B.

    Args:
        num_layers: L.
        num_blocks: B.

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
    """Return the shape of a backbone from its configuration, without reading or drawing weights.

    Raises:
        ConfigError: The backbone's folder cannot be located, or its configuration is invalid.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # `locate` would draw random weights
    settings = read_config(backbone) if backbone.random is None else make_config(backbone.random)
    with torch.device("meta"), reporting_load_errors(f"backbone {backbone.name}: no model of this configuration"):
        model = AutoModelForCausalLM.from_config(settings, attn_implementation=None)
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
    """Return whether a name is a module's whole path or the last components of the path.

    >>> matches_name("self_attn.q_proj", "q_proj"), matches_name("self_attn.q_proj", "proj")
    (True, False)
    """
    return path == name or path.endswith(f".{name}")
