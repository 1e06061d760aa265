"""How far a model's predictions are from those of its backbone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mode.data.pack import PackedSplit
from mode.evaluation.next_token import read_rows

TOKENS = 16_384
"""Default number of tokens that are compared, in whole rows from the first of a split."""


@torch.no_grad()
def measure_divergence(
    model: nn.Module, backbone: nn.Module, split: PackedSplit, *, sequence_length: int, chunk: int, tokens: int = TOKENS
) -> float:
    """Return KL(backbone || model) of the next token in nats, mean over the first tokens of a split.

    On the targets' text it goes with what a model forgets elsewhere (Shenfeld et al., 2025, arXiv 2509.04259).

    Args:
        model: A causal LM.
        backbone: The untouched backbone, on the same device.
        split: The packed split.
        sequence_length: Tokens per row.
        chunk: Tokens whose logits exist at one time, if a row is not longer.
        tokens: Number of tokens, at most; at least one row is compared.
    """
    device = next(model.parameters()).device
    length = min(sequence_length, len(split.tokens) - 1)
    count = max(1, min(tokens, len(split.tokens) - 1) // length)
    inputs = read_rows(split, np.arange(count), length)[0].to(device)
    was_training = model.training, backbone.training
    for each in (model, backbone):
        each.eval()
    total = 0.0
    for rows in torch.split(inputs, max(1, chunk // length)):
        ours, known = (compute_logits(each, rows) for each in (model, backbone))
        for pieces in zip(torch.split(known, chunk), torch.split(ours, chunk), strict=True):
            log_p, log_q = (logits.float().log_softmax(-1) for logits in pieces)
            total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    for each, was in zip((model, backbone), was_training, strict=True):
        each.train(was)
    return total / inputs.numel()


def compute_logits(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the logits of the next tokens of rows, (B, S), as (B S, V)."""
    logits: Tensor = model(input_ids=rows, use_cache=False).logits
    return logits.flatten(0, 1)
