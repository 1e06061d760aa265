"""Options of a training step: compiled layers, recomputed activations, frozen weights in bf16, attention, branches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mode.backbone.structure import find_decoder_layers, find_frozen_matrices
from mode.config.train import Train
from mode.core.errors import ConfigError
from mode.modular.block import Block, execute_blocks, find_blocks
from mode.ops.attention import UNMASKED, check_flex_attention, find_configs, find_unmasked_configs
from mode.ops.loss import find_auxiliary_modules
from mode.ops.patch import Patch

COMPILED_FROM = {"cpu": 2e13, "cuda": 5e16}
"""Floating-point operations of a stage from which compiling pays, by type of device: minutes of work. Compiling takes
up to 40 s. A compiled step takes about a seventh less time on a CPU, a third less on an H200 (`mode bench loops`)."""


RECOMPILE_LIMIT = 64
"""Variants of a layer that code is compiled for: by shape, by the parameters that train in the layer and before it, by
attention. Beyond torch's own limit, which is 8, layers would run uncompiled, with no more than a warning."""


def should_compile(settings: Train, device: torch.device, flops: float) -> bool:
    """Say whether to compile a stage's layers; `auto` decides by the stage's floating-point operations."""
    if settings.kernels.compile == "auto":
        return flops >= COMPILED_FROM[device.type]
    return settings.kernels.compile


class StepOptions:
    """A context in which a model runs with the loop's options: training steps, but neither scoring nor saving.

    Recomputed layers keep their input alone and recompute their activations in the backward pass, through the switch
    that `transformers` gives every layer. Compiling is by layer, and all layers of one shape share the code. Autocast
    casts a frozen matrix to bf16 at every use, and the backward pass keeps each copy; a copy that is made once gives
    the same bits. Rows have no padding, so causal attention needs no mask; the library would find that out anew in
    every forward pass, and wait for the device each time.
    """

    def __init__(self, model: nn.Module, settings: Train, *, half: bool = False) -> None:
        """Choose the layers; compiled layers are compiled at their first use.

        Args:
            model: The model, with its frozen parameters marked.
            settings: Settings of the loop.
            half: Whether matrix products run in bf16.

        Raises:
            ConfigError: Streams or FlexAttention without a CUDA device, FlexAttention with a family that does not
                support it, or batched experts with attention other than torch's own over whole rows.
        """
        kind = next(model.parameters()).device.type
        if settings.kernels.branch_execution == "streams" and kind != "cuda":
            raise ConfigError(
                "train.kernels.branch_execution=streams needs a CUDA device; loop and batched go without one"
            )
        self.blocks, self.branches = find_blocks(model), settings.kernels.branch_execution
        self.skip_unchosen = not settings.kernels.cuda_graph  # counting chosen tokens waits for the device
        joined = not settings.batch.intra_document_masking
        self.attention_configs = find_unmasked_configs(model, settings.sequence_length) if joined else []
        has_blocks = any(isinstance(block, Block) for block in self.blocks)
        if settings.kernels.branch_execution == "batched" and has_blocks and not self.attention_configs:
            raise ConfigError(
                "train.kernels.branch_execution=batched: not with layers that see a part of the row alone; "
                "loop goes with all"
            )
        self.attention = UNMASKED
        if settings.kernels.attention == "flex":
            check_flex_attention(model, kind)
            self.attention, self.attention_configs = "flex_attention", find_configs(model)
        self.former_attention = [config._attn_implementation for config in self.attention_configs]
        patched = settings.kernels.compile is not True and settings.kernels.branch_execution == "loop"
        self.patch: AbstractContextManager[None] = Patch(model) if patched else nullcontext()
        layers = find_decoder_layers(model)
        frozen = find_frozen_matrices(layers) if half else []
        self.bf16_weights = [(weight, weight.data, weight.data.bfloat16()) for weight in frozen]
        recomputed = [layer for layer in layers if is_recomputed(layer, settings.memory.activation_checkpointing)]
        self.recomputed = [(layer, partial(make_contexts, find_auxiliary_modules(layer))) for layer in recomputed]
        self.compiled: list[tuple[Any, Any]] = []
        if settings.kernels.compile is True:
            torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        for layer in layers if settings.kernels.compile is True else ():
            layer.compile(dynamic=False)
            self.compiled.append((layer, layer._compiled_call_impl))
            layer._compiled_call_impl = None

    def __enter__(self) -> None:
        """Switch the options on for a step."""
        self.stack = ExitStack()
        self.stack.enter_context(self.patch)
        self.stack.enter_context(execute_blocks(self.blocks, branches=self.branches, skip_unchosen=self.skip_unchosen))
        for layer, contexts in self.recomputed:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=contexts)
        for layer, code in self.compiled:
            layer._compiled_call_impl = code
        for weight, _full, half in self.bf16_weights:
            weight.data = half
        for config in self.attention_configs:
            config._attn_implementation = self.attention

    def __exit__(self, *_: object) -> None:
        """Switch the options off."""
        for layer, _contexts in self.recomputed:
            layer.gradient_checkpointing = False
        for layer, _code in self.compiled:
            layer._compiled_call_impl = None
        for weight, full, _half in self.bf16_weights:
            weight.data = full
        for config, attention in zip(self.attention_configs, self.former_attention, strict=True):
            config._attn_implementation = attention
        self.stack.close()


def is_recomputed(layer: nn.Module, which: str) -> bool:
    """Say whether a layer's activations are recomputed: `all` layers, the `frozen` ones, or `none`."""
    return which == "all" or (which == "frozen" and not any(each.requires_grad for each in layer.parameters()))


def make_contexts(modules: Sequence[Any]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a layer's forward pass and of its recomputation.

    Args:
        modules: The layer's modules with an auxiliary loss. The loss has been read when the layer is recomputed, and
            the recomputed one is dropped, since it would keep all activations.
    """

    @contextmanager
    def drop_auxiliary() -> Iterator[None]:
        try:
            yield
        finally:
            for module in modules:
                module.auxiliary = None

    return nullcontext(), drop_auxiliary()
