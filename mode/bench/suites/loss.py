"""Suite `loss`: next-token loss and its gradients from final hidden states, by chunk size and with full logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.backbone.shape import read_shape
from mode.bench.timing import Case
from mode.ops.loss import NATIVE, ChunkedLoss, compute_next_token_loss, score_states

if TYPE_CHECKING:
    from mode.config.run import Run
    from mode.methods.mode import MoDE

SIZES = (128, 256, 512, 1024, 2048, 4096)
"""Chunk sizes to compare, in tokens."""


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function of final hidden states, (tokens, d), the head, (V, d), and next tokens that returns the mean loss."""


def prepare_losses(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return cases that compute losses and scores, and the bytes of full logits.

    Args:
        run: Run with the backbone (only its width and vocabulary matter), the batch size and the sequence length.
        method: Not used.
        device: Device of the tensors.
        folder: Not used.
    """
    shape, tokens = read_shape(run.backbone), run.train.batch.size * run.train.sequence_length
    states = torch.randn(tokens, shape.hidden, device=device, requires_grad=True)
    targets = torch.randint(shape.vocabulary, (tokens,), device=device)
    forms: dict[str, Loss] = {
        "full logits": compute_full_logits_loss,
        **({"chunks as torch chooses them": partial(compute_fused_loss, chunk=None)} if NATIVE else {}),
        **{f"chunks of {size}": partial(compute_fused_loss, chunk=size) for size in SIZES if size < tokens and NATIVE},
        "mode": compute_own_loss,
        "full logits, bf16": partial(compute_full_logits_loss, kind=torch.bfloat16),
        **{f"chunks of {size}, bf16": partial(compute_chunked_loss, chunk=size) for size in SIZES if size < tokens},
        "mode, bf16": partial(compute_own_loss, precision="bf16"),
    }
    cases = []
    for trains in (False, True):
        weight = torch.randn(shape.vocabulary, shape.hidden, device=device).mul_(0.02).requires_grad_(trains)
        flops = tokens * shape.head(trains=trains).total
        job = f"loss, head {'trains' if trains else 'frozen'}"
        for name, form in forms.items():
            action = partial(run_both_passes, form, states, weight, targets)
            precision = "bf16" if "bf16" in name else "fp32"
            cases.append(Case(job, name, action, tokens, flops=flops, precision=precision, counted=True))
    scorers: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
        "full logits": score_full_logits,
        "mode": score_states,
    }
    for name, scorer in scorers.items():
        flops = tokens * shape.head(trains=False).forward
        score = partial(scorer, states.detach(), weight.detach(), targets)
        cases.append(Case("scores", name, score, tokens=tokens, flops=flops, counted=True))
    return cases, {"full logits": 4 * tokens * shape.vocabulary}


def run_both_passes(form: Loss, states: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Compute a loss and its gradients, and discard both."""
    torch.autograd.backward(form(states, weight, targets))
    states.grad = weight.grad = None


def compute_own_loss(states: Tensor, weight: Tensor, targets: Tensor, *, precision: str = "fp32") -> Tensor:
    """Return the loss of the training loop."""
    return compute_next_token_loss(states[None], weight, targets[None], precision=precision)


def compute_full_logits_loss(
    states: Tensor, weight: Tensor, targets: Tensor, *, kind: torch.dtype = torch.float32
) -> Tensor:
    """Return the loss from the logits of all tokens, as `transformers` computes it."""
    return functional.cross_entropy((states.to(kind) @ weight.T.to(kind)).float(), targets)


def compute_chunked_loss(states: Tensor, weight: Tensor, targets: Tensor, *, chunk: int) -> Tensor:
    """Return this project's loss in bf16, in chunks of `chunk` tokens."""
    loss: Tensor = ChunkedLoss.apply(states, weight, targets, torch.bfloat16, chunk)  # type: ignore[no-untyped-call]
    return loss


def compute_fused_loss(states: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None) -> Tensor:
    """Return the loss of torch's fused function, in chunks of `chunk` tokens; None lets torch choose."""
    options = nn.LinearCrossEntropyOptions()
    if chunk is not None:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
    return functional.linear_cross_entropy(states, weight, targets, options=options)


@torch.no_grad()
def score_full_logits(states: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Score all tokens from full logits."""
    logits = states @ weight.T
    functional.cross_entropy(logits, targets, reduction="none")
    logits.argmax(-1).eq(targets)
