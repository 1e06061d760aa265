"""Causal attention without a mask, and FlexAttention where it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.core.errors import ConfigError

UNMASKED = "mode_unmasked"
"""Name by which `transformers` knows `attend_causally`, which has no mask made beside it."""


def attend_causally(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    """Run the library's attention by torch's own function; where experts are batched, of all of them at once."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if torch.compiler.is_compiling() or not torch._C._functorch.is_batchedtensor(query):
        return sdpa_attention_forward(module, query, key, value, *args, **options)
    dropout = options.get("dropout", 0.0) if module.training else 0.0
    states: Tensor = BatchedAttention.apply(query, key, value, dropout, options.get("scaling"))  # type: ignore[no-untyped-call]
    return states.transpose(1, 2).contiguous(), None


class BatchedAttention(torch.autograd.Function):
    """Causal attention of batched experts: rows of all experts are rows of one call.

    Torch's rule for batching attention knows neither autocast nor processors. Gradients are those of the one call.
    """

    @staticmethod
    def forward(*given: Any) -> Tensor:
        """Is never called: this exists for `vmap`."""
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Is never called."""

    @staticmethod
    def vmap(
        info: Any, places: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
    ) -> tuple[Tensor, int]:
        """Attend with queries, (N, B, H, S, D), and keys and values, (N, B, K, S, D)."""
        n = info.batch_size
        q, k, v = (
            each.movedim(place, 0).flatten(0, 1) for each, place in zip((query, key, value), places, strict=False)
        )
        states = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        return states.view(n, -1, *states.shape[1:]), 0


FLEXIBLE = ("cuda",)
"""Types of device on which FlexAttention trains."""


def find_unmasked_configs(model: nn.Module, length: int) -> list[Any]:
    """Return the configurations by which decoders attend that need no mask for rows of so many tokens.

    Those are decoders with torch's own attention where no layer sees less than the whole row.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(UNMASKED, attend_causally)
    return [
        each for each in find_configs(model) if each._attn_implementation == "sdpa" and sees_whole_rows(each, length)
    ]


def find_configs(model: nn.Module) -> list[Any]:
    """Return the configurations by which decoders attend."""
    from transformers import PretrainedConfig

    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(each): each for each in configs if isinstance(each, PretrainedConfig)}.values())


def check_flex_attention(model: Any, kind: str) -> None:
    """Refuse FlexAttention where it does not train: on a device of another type, or a family without it.

    Raises:
        ConfigError: It is so.
    """
    if kind not in FLEXIBLE:
        raise ConfigError("train.kernels.attention=flex needs a CUDA device: FlexAttention does not train on others")
    if not model._supports_flex_attn:
        family = model.config.model_type
        raise ConfigError(
            f"train.kernels.attention=flex: transformers has no FlexAttention for {family}; sdpa goes with all"
        )


def sees_whole_rows(config: Any, length: int) -> bool:
    """Say whether all layers of a decoder see the whole of rows of so many tokens."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    return window is None or window >= length
