"""How far a model's predictions are from those of its backbone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mode.data.pack import PackedSplit
from mode.evaluation.next_token import make_rows

ROWS = 64
"""Number of rows that are compared, from the first of a split."""


@torch.no_grad()
def measure_divergence(
    model: nn.Module, backbone: nn.Module, split: PackedSplit, *, sequence_length: int, chunk: int
) -> float:
    """Return KL(backbone || model) of the next token in nats, mean over the tokens of a split's first `ROWS` rows.

    On the targets' text it goes with what a model forgets elsewhere (Shenfeld et al., 2025, arXiv 2509.04259).

    Args:
        model: A causal LM.
        backbone: The untouched backbone, on the same device.
        split: The packed split.
        sequence_length: Tokens per row.
        chunk: Tokens whose logits are compared at one time.
    """
    device = next(model.parameters()).device
    rows = max(1, min(ROWS, (len(split.tokens) - 1) // sequence_length))
    stream = torch.from_numpy(np.asarray(split.tokens[: rows * sequence_length + 1], np.int64)).to(device)
    length = min(sequence_length, len(stream) - 1)
    inputs, _ = make_rows(stream, length, split.bos)
    was_training = model.training, backbone.training
    model.eval(), backbone.eval()
    total = 0.0
    for row in inputs:
        ours, known = (compute_logits(each, row) for each in (model, backbone))
        for start in range(0, length, chunk):
            piece = slice(start, start + chunk)
            log_p, log_q = (logits[piece].float().log_softmax(-1) for logits in (known, ours))
            total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    model.train(was_training[0]), backbone.train(was_training[1])
    return total / inputs.numel()


def compute_logits(model: nn.Module, row: Tensor) -> Tensor:
    """Return the logits of the next tokens of a row, (S, V)."""
    logits: Tensor = model(input_ids=row[None], use_cache=False).logits[0]
    return logits
