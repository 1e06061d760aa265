"""Run a branch on the tokens that choose it: what a gate with `top_k` or `top_p` saves.

A branch is a stack of layers with attention, so a token that chooses it attends to tokens that do not. But the last
layer's outputs of those tokens are not used. The last layer computes their keys and values alone, a fraction of a
layer; queries, the rest of attention and the feed-forward part run on the tokens that choose the branch. With one layer
per expert, that is the whole expert.

Shapes: B rows, S tokens per row, K tokens of a row that are run, H heads, D size of a head, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mode.cost.modular import WORTH
from mode.modular.branches import Call, run_layers
from mode.ops.attention import UNMASKED

NEEDED = ("past_key_values", "position_embeddings", "position_ids", "attention_mask")
"""Arguments that a decoder must pass to its layers by these names."""


def can_skip(layers: Sequence[Any], calls: Sequence[Call]) -> bool:
    """Say whether a branch's last layer can skip tokens.

    It cannot with a key-value cache, with recomputed activations (the library then passes no cache object), with
    sharded or split weights, with attention that takes no mask of queries by keys (FlashAttention, FlexAttention), or
    with an unknown argument that has a token dimension. A layer is compiled for whole rows, so here its uncompiled code
    runs.
    """
    layer, (args, options) = find_last_layer(layers, calls)
    if args or any(name not in options for name in NEEDED) or options["past_key_values"] is not None:
        return False
    mask, places, angles = (options[name] for name in ("attention_mask", "position_ids", "position_embeddings"))
    if mask is None and (find_attention(layer) not in ("sdpa", UNMASKED) or options.get("is_causal") is False):
        return False
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
        return False
    if places is None or places.ndim != 2 or len(angles) != 2 or any(each.ndim != 3 for each in angles):
        return False
    if any(isinstance(each, Tensor) and each.ndim > 1 for name, each in options.items() if name not in NEEDED):
        return False
    whole = all(type(weight) is nn.Parameter and not hasattr(weight, "ds_id") for weight in layer.parameters())
    return whole and not (layer.gradient_checkpointing and layer.training)


def find_attention(layer: nn.Module) -> str | None:
    """Return the attention implementation of a layer, by its name in `transformers`."""
    configs = (getattr(module, "config", None) for module in layer.modules())
    return next((each._attn_implementation for each in configs if each is not None), None)


def find_last_layer(layers: Sequence[Any], calls: Sequence[Call]) -> tuple[Any, Call]:
    """Return a branch's last layer, and its arguments."""
    return layers[-1], calls[(len(layers) - 1) % len(calls)]


def add_chosen_branch(
    total: Tensor, layers: Sequence[Any], states: Tensor, calls: Sequence[Call], weight: Tensor, counts: Sequence[int]
) -> Tensor:
    """Add a branch to the weighted sum, run on the rows that choose it and, in its last layer, on those tokens alone.

    In training, a branch that no token chooses still runs on one token, so that the gradients of its weights are zero
    instead of missing.

    Args:
        total: The sum, (B, S, d), changed in place.
        layers: The branch.
        states: Input, (B, S, d).
        calls: Arguments of each layer.
        weight: Weight of the branch, (B, S, 1); a token chooses the branch where the weight is not zero.
        counts: Number of tokens that choose the branch, by row.
    """
    rows = [row for row, count in enumerate(counts) if count]
    if not rows:
        if not torch.is_grad_enabled():
            return total
        rows = [0]
    number, most = states.shape[1], max(1, *counts)
    if any(layer._compiled_call_impl is not None for layer in layers):  # compiled for this number of rows
        rows = list(range(len(counts)))
    if len(rows) < len(counts):
        some = torch.tensor(rows, device=states.device)
        states, weight, calls = states[some], weight[some], [select_rows(call, some, len(counts)) for call in calls]
    if most > WORTH * number:
        output = run_layers(layers, states, calls)
        chosen = torch.arange(number, device=states.device).expand(len(rows), -1)
    else:
        output, chosen = run_some(layers, states, calls, weight[..., 0] != 0, most)
    values = (gather_tokens(weight, chosen).to(output.dtype) * output).to(total.dtype)
    if len(rows) == len(counts):
        return total.scatter_add_(1, chosen[..., None].expand_as(values), values)
    return total.index_put_((some[:, None], chosen), values, accumulate=True)


def select_rows(call: Call, some: Tensor, count: int) -> Call:
    """Return a layer's arguments for some of `count` rows."""

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(each) for each in value)
        return value[some] if isinstance(value, Tensor) and value.ndim > 1 and len(value) == count else value

    args, options = call
    return args, {name: cut(value) for name, value in options.items()}


def run_some(
    layers: Sequence[Any], states: Tensor, calls: Sequence[Call], kept: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Run a branch whose last layer computes the outputs of some tokens alone.

    Args:
        layers: The branch.
        states: Input, (B, S, d).
        calls: Arguments of each layer; the last layer must be able to skip tokens (`can_skip`).
        kept: Which tokens choose the branch, (B, S).
        count: K, the largest number of such tokens in a row; rows with fewer run other tokens too.

    Returns:
        The output, (B, K, d), and the positions of its tokens, (B, K).
    """
    states = run_layers(layers[:-1], states, calls)
    layer, (_, options) = find_last_layer(layers, calls)
    chosen = kept.byte().argsort(dim=1, descending=True, stable=True)[:, :count]
    context = Context()
    with suppress(KeysTakenError):
        layer.forward(states, **options | {"past_key_values": context})
    some = {
        "past_key_values": context,
        "position_embeddings": tuple(gather_tokens(each, chosen) for each in options["position_embeddings"]),
        "position_ids": options["position_ids"].expand_as(kept).gather(1, chosen),
        "attention_mask": make_mask(options["attention_mask"], chosen, states.shape[1]),
    }
    output: Tensor = layer.forward(gather_tokens(states, chosen), **options | some)
    return output, chosen


def gather_tokens(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the values of chosen tokens, (B or 1, S, n) to (B, K, n)."""
    wide = values.expand(len(chosen), -1, -1)
    return wide.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))


def make_mask(mask: Tensor | None, chosen: Tensor, length: int) -> Tensor:
    """Return the rows of an attention mask for the chosen queries, (B, 1, K, S).

    Args:
        mask: The decoder's mask, (B or 1, 1, S, S), boolean or additive; None for causal attention.
        chosen: Positions, (B, K).
        length: S.
    """
    if mask is None:
        return chosen[:, None, :, None] >= torch.arange(length, device=chosen.device)
    wide = mask.expand(len(chosen), -1, -1, -1)
    return wide.gather(2, chosen[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))


class KeysTakenError(Exception):
    """Ends a forward pass that computes keys and values alone."""


class Context:
    """Replaces a cache: stores all tokens' keys and values in a first pass, which ends there, and returns them next."""

    def __init__(self) -> None:
        """Store nothing yet."""
        self.found: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values of all tokens, (B, H, S, D), or return the stored ones in place of some tokens' own.

        Raises:
            KeysTakenError: They have been stored just now.
        """
        if self.found is None:
            self.found = keys, values
            raise KeysTakenError
        return self.found
