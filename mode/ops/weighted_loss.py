"""Next-token loss with a weight per token, computed chunk by chunk.

Shapes: B rows, S tokens per row, d hidden size, V vocabulary size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mode.ops.loss import choose_chunk


def compute_weighted_loss(
    states: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, cap: float | None = None, precision: str = "fp32"
) -> Tensor:
    """Return the mean over all tokens of a batch of weight times cross-entropy, in nats.

    Logits are computed chunk by chunk and recomputed in the backward pass. With weights of one the loss is
    `mode.ops.loss.compute_next_token_loss`, up to rounding.

    Args:
        states: Final hidden states, (B, S, d).
        weight: Head, (V, d).
        targets: Next tokens, (B, S).
        weights: Weight of every token, (B, S). They receive no gradient.
        cap: Softcap of the logits, or None. Capped logits are in fp32.
        precision: Precision of the matrix products, `fp32` or `bf16`. All other operations are in fp32.
    """
    kind = torch.bfloat16 if precision == "bf16" and cap is None else torch.float32
    parts = (states.reshape(-1, states.shape[-1]).float(), targets.reshape(-1), weights.detach().reshape(-1))
    total = torch.zeros((), device=states.device)
    chunks = (torch.split(part, choose_chunk(weight, kind)) for part in parts)
    for piece, labels, shares in zip(*chunks, strict=True):
        total = total + checkpoint(sum_weighted, piece, weight, labels, shares, cap, kind, use_reentrant=False)
    return total / targets.numel()


def sum_weighted(
    states: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, cap: float | None, kind: torch.dtype
) -> Tensor:
    """Return weight times cross-entropy of a chunk of tokens, summed over tokens."""
    logits = (states.to(kind) @ weight.to(kind).T).float()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return functional.cross_entropy(logits, targets, reduction="none") @ weights
