"""What the loop asks of decoder layers: fewer passes, fewer activations, compiling, frozen parts in bf16, no masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mode.branches import UNMASKED, causal_attention
from mode.checked import ConfigError
from mode.exchange import Exchange
from mode.loss import with_auxiliary
from mode.train_settings import Train

FLEXIBLE = ("cuda",)
"""Types of device on which FlexAttention trains."""

COMPILED_FROM = {"cpu": 2e13, "cuda": 5e16}
"""Operations of a stage from which compiling pays, by type of device: minutes of work. Compiling takes up to 40 s. What
is compiled takes about a seventh less time on a processor, and a third less on an H200 (`mode bench loops`)."""


KINDS = 64
"""Kinds of layers that code is compiled for: by shape, by what trains in them and before them, by their attention. With
more than torch allows, which is 8, it goes on with layers as they are, and says so in a warning alone."""


def compiles(settings: Train, device: torch.device, flops: float) -> bool:
    """Say whether a stage's layers are to be compiled, by the operations that it takes where that decides."""
    if settings.compile == "auto":
        return flops >= COMPILED_FROM[device.type]
    return settings.compile


def decoder_layers(model: nn.Module) -> list[Any]:
    """Return a model's decoder layers, those of experts among them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class Layers:
    """A model's layers, which do as the settings of the loop say within its context: in training steps alone.

    A layer that is checkpointed keeps its input alone and forms its activations again in the backward pass, through the
    switch that `transformers` gives to every layer. Compiling is by layer: all layers of one shape share the code.
    Autocast makes a copy in bf16 of a frozen matrix whenever it is used, and the backward pass keeps each: one that is
    made once gives the same bits. Rows have no padding, so attention is causal without a mask; to find that out anew in
    every pass, as the library does, is to wait for the device.
    """

    def __init__(self, model: nn.Module, settings: Train, *, half: bool = False) -> None:
        """Choose the layers, and have them compiled when they are first used.

        Args:
            model: The model, with what is frozen frozen.
            settings: The loop's.
            half: Whether products of matrices are in bf16.

        Raises:
            ConfigError: Streams or FlexAttention are asked for without a CUDA device, or it of a family that has none,
                or batched experts whose attention is not torch's own over whole rows.
        """
        kind = next(model.parameters()).device.type
        if settings.branches == "streams" and kind != "cuda":
            raise ConfigError("train.branches=streams needs a CUDA device; loop and batched go without one")
        self.blocks: list[Any] = [block for block in model.modules() if hasattr(block, "beside")]
        self.branches, self.skips = settings.branches, not settings.graph  # to ask what to skip waits for the device
        joined = settings.documents == "joined"
        self.attending = unmasked(model, settings.sequence_length) if joined else []
        if settings.branches == "batched" and self.blocks and not self.attending:
            raise ConfigError(
                "train.branches=batched: not with layers that see a part of the row alone; loop goes with all"
            )
        self.attention = UNMASKED
        if settings.attention == "flex":
            check_flexible(model, kind)
            self.attention, self.attending = "flex_attention", configs_of(model)
        self.before = [config._attn_implementation for config in self.attending]
        plain = settings.compile is not True and settings.branches == "loop"
        self.exchange: AbstractContextManager[None] = Exchange(model) if plain else nullcontext()
        layers = decoder_layers(model)
        self.held = [(weight, weight.data, weight.data.bfloat16()) for weight in frozen_matrices(layers) if half]
        chosen = [layer for layer in layers if forms_again(layer, settings.activation_checkpointing)]
        self.again = [(layer, partial(contexts, with_auxiliary(layer))) for layer in chosen]
        self.compiled: list[tuple[Any, Any]] = []
        if settings.compile is True:
            torch._dynamo.config.recompile_limit = max(KINDS, torch._dynamo.config.recompile_limit)
        for layer in layers if settings.compile is True else ():
            layer.compile(dynamic=False)
            self.compiled.append((layer, layer._compiled_call_impl))
            layer._compiled_call_impl = None

    def __enter__(self) -> None:
        """Begin a step."""
        self.exchange.__enter__()
        for layer, wanting in self.again:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=wanting)
        for layer, code in self.compiled:
            layer._compiled_call_impl = code
        for weight, _full, half in self.held:
            weight.data = half
        for block in self.blocks:
            block.beside, block.skips = self.branches, self.skips
        for config in self.attending:
            config._attn_implementation = self.attention

    def __exit__(self, *_: object) -> None:
        """End a step."""
        self.exchange.__exit__(None, None, None)
        for layer, _wanting in self.again:
            layer.gradient_checkpointing = False
        for layer, _code in self.compiled:
            layer._compiled_call_impl = None
        for weight, full, _half in self.held:
            weight.data = full
        for block in self.blocks:
            block.beside, block.skips = "loop", True
        for config, before in zip(self.attending, self.before, strict=True):
            config._attn_implementation = before


def forms_again(layer: nn.Module, which: str) -> bool:
    """Say whether a layer's activations are to be formed again."""
    return which == "all" or (which == "frozen" and not any(each.requires_grad for each in layer.parameters()))


def contexts(modules: Sequence[Any]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts in which a layer forms its activations, and forms them again.

    Args:
        modules: What of the layer leaves something for the loss. It has been taken when activations are formed again,
            and what is left then would keep all of them.
    """

    @contextmanager
    def again() -> Iterator[None]:
        try:
            yield
        finally:
            for module in modules:
                module.auxiliary = None

    return nullcontext(), again()


def frozen_matrices(layers: list[Any]) -> list[Tensor]:
    """Return the weights of the linear maps in decoder layers that are not trained, each once."""
    maps = (module for layer in layers for module in layer.modules() if type(module) is nn.Linear)
    return list(dict.fromkeys(each.weight for each in maps if not each.weight.requires_grad))


def unmasked(model: nn.Module, length: int) -> list[Any]:
    """Return the configurations by which decoders attend that need no mask for rows of so many tokens.

    Those are decoders with torch's own attention where no layer sees less than the whole row.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(UNMASKED, causal_attention)
    return [each for each in configs_of(model) if each._attn_implementation == "sdpa" and sees(each, length)]


def configs_of(model: nn.Module) -> list[Any]:
    """Return the configurations by which decoders attend."""
    from transformers import PretrainedConfig

    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(each): each for each in configs if isinstance(each, PretrainedConfig)}.values())


def check_flexible(model: Any, kind: str) -> None:
    """Refuse FlexAttention where it does not train: on a device of another type, or a family without it.

    Raises:
        ConfigError: It is so.
    """
    if kind not in FLEXIBLE:
        raise ConfigError("train.attention=flex needs a CUDA device: FlexAttention does not train on others")
    if not model._supports_flex_attn:
        family = model.config.model_type
        raise ConfigError(f"train.attention=flex: transformers has no FlexAttention for {family}; sdpa goes with all")


def sees(config: Any, length: int) -> bool:
    """Say whether all layers of a decoder see the whole of rows of so many tokens."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    return window is None or window >= length
