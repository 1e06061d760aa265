"""Causal attention without a mask, and checks for FlexAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.core.errors import ConfigError

UNMASKED = "mode_unmasked"
"""Name under which `attend_causally` is registered in `transformers`, which then builds no attention mask."""


def attend_causally(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    """Compute causal attention with torch's scaled dot-product attention; one call serves all batched experts.

    Args:
        module: Attention layer of `transformers`.
        query: Queries, (B, H, S, D); inside `torch.vmap`, batched over experts.
        key: Keys, (B, K, S, D).
        value: Values, of the shape of the keys.
        args: Further arguments of the library's attention functions.
        options: Keyword arguments of the library's attention functions.

    Returns:
        The outputs, (B, S, H, D), and None in place of attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if torch.compiler.is_compiling() or not torch._C._functorch.is_batchedtensor(query):
        return sdpa_attention_forward(module, query, key, value, *args, **options)
    dropout = options.get("dropout", 0.0) if module.training else 0.0
    states: Tensor = BatchedAttention.apply(query, key, value, dropout, options.get("scaling"))  # type: ignore[no-untyped-call]
    return states.transpose(1, 2).contiguous(), None


class BatchedAttention(torch.autograd.Function):
    """Causal attention of batched experts: the rows of all experts form one batch of one call.

    Torch's batching rule for attention supports neither autocast nor CPUs. Gradients are those of the one call.
    """

    @staticmethod
    def forward(*given: Any) -> Tensor:
        """Raise an error: only `vmap` is used."""
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Do nothing: only `vmap` is used."""

    @staticmethod
    def vmap(
        info: Any, places: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
    ) -> tuple[Tensor, int]:
        """Attend with queries, (N, B, H, S, D), and keys and values, (N, B, K, S, D), of N experts."""
        n = info.batch_size
        q, k, v = (
            part.movedim(place, 0).flatten(0, 1) for part, place in zip((query, key, value), places, strict=False)
        )
        states = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        return states.view(n, -1, *states.shape[1:]), 0


FLEXIBLE = ("cuda",)
"""Device types on which FlexAttention has a backward pass."""


def find_unmasked_configs(model: nn.Module, length: int) -> list[Any]:
    """Return the configurations of decoders that need no attention mask, and register `attend_causally`.

    These decoders use torch's scaled dot-product attention, and all their layers attend to the whole row.

    Args:
        model: The model.
        length: Tokens per row.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(UNMASKED, attend_causally)
    return [
        config
        for config in find_configs(model)
        if config._attn_implementation == "sdpa" and sees_whole_rows(config, length)
    ]


def find_configs(model: nn.Module) -> list[Any]:
    """Return the distinct `transformers` configurations of a model's modules."""
    from transformers import PretrainedConfig

    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if isinstance(config, PretrainedConfig)}.values())


def check_flex_attention(model: Any, kind: str) -> None:
    """Check that a model can train with FlexAttention.

    Args:
        model: A model of `transformers`.
        kind: Type of the device.

    Raises:
        ConfigError: The device has no FlexAttention with a backward pass, or the model's family does not support it.
    """
    if kind not in FLEXIBLE:
        raise ConfigError("train.kernels.attention=flex needs a CUDA device; use sdpa on others")
    if not model._supports_flex_attn:
        family = model.config.model_type
        raise ConfigError(f"train.kernels.attention=flex: transformers has no FlexAttention for {family}; use sdpa")


def sees_whole_rows(config: Any, length: int) -> bool:
    """Return whether all layers of a decoder attend to the whole of a row of `length` tokens."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    return window is None or window >= length
