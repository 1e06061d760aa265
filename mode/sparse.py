"""A branch on the tokens that keep it: what a gate with `top_k` or `top_p` saves.

A branch is layers with attention, so a token that keeps it needs keys and values of tokens that do not. But nobody
reads what a branch's last layer makes of those: there they give keys and values alone, which are a fraction of a
layer, and queries, the rest of attention and the feed-forward part are run on the tokens that keep the branch. With one
layer per expert that is all of the expert.

Shapes: B rows, S tokens per row, K tokens of a row that are run, H heads, D size of a head, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mode.branches import UNMASKED, Call, run_layers

NEEDED = ("past_key_values", "position_embeddings", "position_ids", "attention_mask")
"""What a decoder has to give to its layers by these names."""

WHOLE = ("gpt_neox", "gpt2")
"""Families whose decoders do not."""

WORTH = 0.75
"""Share of a row's tokens up to which it takes less time to leave the others out (measured on a processor)."""


def can_skip(layers: Sequence[Any], calls: Sequence[Call]) -> bool:
    """Say whether a branch's last layer may leave tokens out.

    Not with a cache, nor where activations are formed again, for then a layer gets none, nor with weights in shards or
    in slices; and attention has to take a mask of tokens by tokens, as FlashAttention and FlexAttention do not. A layer
    that is compiled is so for whole rows: it runs as it is written.
    """
    layer, (args, options) = last(layers, calls)
    if args or any(name not in options for name in NEEDED) or options["past_key_values"] is not None:
        return False
    mask = options["attention_mask"]
    if mask is None and attention_of(layer) not in ("sdpa", UNMASKED):
        return False
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
        return False
    whole = all(type(weight) is nn.Parameter for weight in layer.parameters())
    return whole and not (layer.gradient_checkpointing and layer.training)


def attention_of(layer: nn.Module) -> str | None:
    """Return how a layer attends, by the name that `transformers` knows it by."""
    configs = (getattr(module, "config", None) for module in layer.modules())
    return next((each._attn_implementation for each in configs if each is not None), None)


def last(layers: Sequence[Any], calls: Sequence[Call]) -> tuple[Any, Call]:
    """Return a branch's last layer, and what is meant for it."""
    return layers[-1], calls[(len(layers) - 1) % len(calls)]


def run_kept(
    layers: Sequence[Any], states: Tensor, calls: Sequence[Call], kept: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Run a branch whose last layer makes an output of some tokens alone.

    Args:
        layers: The branch.
        states: Input, (B, S, d).
        calls: What is meant for each layer; the last may leave tokens out.
        kept: Which tokens keep the branch, (B, S).
        count: K, the most of any row; rows with fewer run others besides.

    Returns:
        The output, (B, K, d), and the positions of its tokens, (B, K).
    """
    states = run_layers(layers[:-1], states, calls)
    layer, (_, options) = last(layers, calls)
    chosen = kept.byte().argsort(dim=1, descending=True, stable=True)[:, :count]
    context = Context()
    with suppress(FoundError):
        layer.forward(states, **options | {"past_key_values": context})
    some = {
        "past_key_values": context,
        "position_embeddings": tuple(picked(each, chosen) for each in options["position_embeddings"]),
        "position_ids": options["position_ids"].expand_as(kept).gather(1, chosen),
        "attention_mask": seen(options["attention_mask"], chosen, states.shape[1]),
    }
    output: Tensor = layer.forward(picked(states, chosen), **options | some)
    return output, chosen


def picked(values: Tensor, chosen: Tensor) -> Tensor:
    """Return what chosen tokens have of values, (B or 1, S, n) to (B, K, n)."""
    wide = values.expand(len(chosen), -1, -1)
    return wide.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))


def add_at(total: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
    """Add values of chosen tokens, (B, K, d), to a sum over branches, (B, S, d), in place."""
    return total.scatter_add_(1, chosen[..., None].expand_as(values), values.to(total.dtype))


def seen(mask: Tensor | None, chosen: Tensor, length: int) -> Tensor:
    """Return which of a row's tokens every chosen one sees, (B, 1, K, S), as the decoder's mask has it for all.

    Args:
        mask: The decoder's, (B, 1, S, S), of any kind; None where attention is causal.
        chosen: Positions, (B, K).
        length: S.
    """
    if mask is None:
        return chosen[:, None, :, None] >= torch.arange(length, device=chosen.device)
    return mask.gather(2, chosen[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))


class FoundError(Exception):
    """Ends a pass that was for keys and values."""


class Context:
    """Keys and values of all tokens in the place of a cache: taken in a first pass, which ends there, given after."""

    def __init__(self) -> None:
        """Wait for them."""
        self.found: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take those of all tokens, (B, H, S, D), or return them instead of some tokens' own.

        Raises:
            FoundError: They have been taken.
        """
        if self.found is None:
            self.found = keys, values
            raise FoundError
        return self.found
