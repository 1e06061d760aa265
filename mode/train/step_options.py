"""What the loop asks of decoder layers: fewer passes, fewer activations, compiling, frozen parts in bf16, no masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mode.backbone.structure import find_decoder_layers, find_frozen_matrices
from mode.config.train import Train
from mode.core.errors import ConfigError
from mode.ops.attention import UNMASKED, check_flex_attention, find_configs, find_unmasked_configs
from mode.ops.loss import find_auxiliary_modules
from mode.ops.patch import Patch

COMPILED_FROM = {"cpu": 2e13, "cuda": 5e16}
"""Operations of a stage from which compiling pays, by type of device: minutes of work. Compiling takes up to 40 s. What
is compiled takes about a seventh less time on a processor, and a third less on an H200 (`mode bench loops`)."""


KINDS = 64
"""Kinds of layers that code is compiled for: by shape, by what trains in them and before them, by their attention. With
more than torch allows, which is 8, it goes on with layers as they are, and says so in a warning alone."""


def should_compile(settings: Train, device: torch.device, flops: float) -> bool:
    """Say whether a stage's layers are to be compiled, by the operations that it takes where that decides."""
    if settings.kernels.compile == "auto":
        return flops >= COMPILED_FROM[device.type]
    return settings.kernels.compile


class StepOptions:
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
        if settings.kernels.branch_execution == "streams" and kind != "cuda":
            raise ConfigError(
                "train.kernels.branch_execution=streams needs a CUDA device; loop and batched go without one"
            )
        self.blocks: list[Any] = [block for block in model.modules() if hasattr(block, "beside")]
        self.branches = settings.kernels.branch_execution
        self.skips = not settings.kernels.cuda_graph  # to ask what to skip waits for the device
        joined = not settings.batch.intra_document_masking
        self.attending = find_unmasked_configs(model, settings.sequence_length) if joined else []
        if settings.kernels.branch_execution == "batched" and self.blocks and not self.attending:
            raise ConfigError(
                "train.kernels.branch_execution=batched: not with layers that see a part of the row alone; "
                "loop goes with all"
            )
        self.attention = UNMASKED
        if settings.kernels.attention == "flex":
            check_flex_attention(model, kind)
            self.attention, self.attending = "flex_attention", find_configs(model)
        self.before = [config._attn_implementation for config in self.attending]
        plain = settings.kernels.compile is not True and settings.kernels.branch_execution == "loop"
        self.exchange: AbstractContextManager[None] = Patch(model) if plain else nullcontext()
        layers = find_decoder_layers(model)
        self.held = [(weight, weight.data, weight.data.bfloat16()) for weight in find_frozen_matrices(layers) if half]
        chosen = [layer for layer in layers if is_recomputed(layer, settings.memory.activation_checkpointing)]
        self.again = [(layer, partial(make_contexts, find_auxiliary_modules(layer))) for layer in chosen]
        self.compiled: list[tuple[Any, Any]] = []
        if settings.kernels.compile is True:
            torch._dynamo.config.recompile_limit = max(KINDS, torch._dynamo.config.recompile_limit)
        for layer in layers if settings.kernels.compile is True else ():
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


def is_recomputed(layer: nn.Module, which: str) -> bool:
    """Say whether a layer's activations are to be formed again."""
    return which == "all" or (which == "frozen" and not any(each.requires_grad for each in layer.parameters()))


def make_contexts(modules: Sequence[Any]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
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
