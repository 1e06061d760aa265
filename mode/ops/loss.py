"""Next-token loss and scores, computed in chunks so that the logits of a whole batch never exist.

Shapes: B rows, S tokens per row, d hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mode.ops.patch import Patch

CHUNK = 512
"""Tokens per chunk of the training loss on a processor, where torch's own choice is several times slower for small
vocabularies."""


HALF_CHUNK = 256
"""The same where a chunk's logits take more memory, in which it is as fast: with more words than `WIDE`, and in bf16,
where they are held in both precisions. Bounded logits and held rows have `CHUNK` of any."""


WIDE = 4096


CUDA_CHUNK = 2048
"""The same on a GPU, whose products of matrices want more rows."""


PART = 2048
"""Words whose part of the head's gradient a processor forms and adds at a time."""


NATIVE = hasattr(nn, "LinearCrossEntropyOptions")
"""Whether torch has the fused loss, which came with 2.13."""


def compute_hidden_states(model: nn.Module, input_ids: Tensor, **options: Any) -> Tensor:
    """Return the final hidden states of a causal LM, (B, S, d), without applying its head.

    A head that is more than a matrix widens them by what its `wide` weight expects (`mode.modular.head`).
    """
    backbone: Any = model.base_model
    states: Tensor = backbone(input_ids=input_ids, **{"use_cache": False} | options).last_hidden_state
    widen = getattr(model.get_output_embeddings(), "widen", None)  # type: ignore[operator]
    return states if widen is None else widen(states)


def output_head(model: nn.Module) -> Tensor:
    """Return the weight of a causal LM's output head, (V, d)."""
    embeddings: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    weight: Tensor = getattr(embeddings, "wide", embeddings.weight)
    return weight


def logit_softcap(model: nn.Module) -> float | None:
    """Return the bound c that a model's logits are squashed to, c tanh(logits / c), or None (Gemma 2)."""
    config: Any = model.config
    cap: float | None = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return cap


def compute_next_token_loss(
    states: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None, precision: str = "fp32"
) -> Tensor:
    """Return the mean cross-entropy in nats over all tokens of a batch.

    The native fused function forms the gradients chunk by chunk in the forward pass and skips the weight's when the
    head is frozen. It knows no bounded logits: those are formed chunk by chunk, and again in the backward pass. Nor
    does it keep sums in fp32 where products are in bf16: `ChunkedLoss` does, which also stands in for it where torch
    has none yet.

    Args:
        states: Final hidden states, (B, S, d).
        weight: Head, (V, d).
        targets: Next tokens, (B, S).
        cap: Bound of the logits, if there is one; they are in fp32 then.
        precision: Of the products of matrices, `fp32` or `bf16`; all else is in fp32.
    """
    flat, labels = states.reshape(-1, states.shape[-1]).float(), targets.reshape(-1)
    if cap is None and (precision == "bf16" or not NATIVE):
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        chunked: Tensor = ChunkedLoss.apply(flat, weight, labels, kind, choose_chunk(weight, kind))  # type: ignore[no-untyped-call]
        return chunked
    if cap is None:
        chunk = choose_chunk(weight, torch.float32)
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
        loss: Tensor = functional.linear_cross_entropy(flat, weight.float(), labels, options=options)
        return loss
    total = torch.zeros((), device=flat.device)
    for piece, wanted in zip(torch.split(flat, CHUNK), torch.split(labels, CHUNK), strict=True):
        total = total + checkpoint(compute_capped_loss, piece, weight.float(), wanted, cap, use_reentrant=False)
    return total / len(labels)


def choose_chunk(weight: Tensor, kind: torch.dtype) -> int:
    """Return the tokens per chunk of a loss with a head, (V, d), by how long they were measured to take."""
    if weight.device.type == "cuda":
        return CUDA_CHUNK
    return HALF_CHUNK if kind == torch.bfloat16 or len(weight) > WIDE else CHUNK


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy whose products of matrices are in bf16 or fp32, and whose sums and softmax are in fp32.

    Like the native function it forms gradients chunk by chunk in the forward pass. On a processor with instructions
    for bf16 the native one is slower in bf16 than in fp32, and its loss has the three digits of bf16.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, kind: torch.dtype, chunk: int) -> Tensor:
        """Return the loss of states, (tokens, d), with a head, (V, d), for next tokens, (tokens,)."""
        narrow, count = weight.to(kind), len(targets)
        for_states = torch.empty_like(states)
        for_weight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=states.device)
        # The same memory for every chunk: on a processor a large piece of it comes from the system, a page at a time.
        products = narrow.new_empty(min(chunk, count), len(weight))
        logits = products if kind == torch.float32 else torch.empty_like(products, dtype=torch.float32)
        found = logits if logits.device.type == "cpu" else torch.empty_like(logits)
        for start in range(0, count, chunk):
            piece = states[start : start + chunk].to(kind)
            wanted = targets[start : start + chunk, None]
            product, wide = products[: len(piece)], logits[: len(piece)]
            torch.mm(piece, narrow.T, out=product)
            if wide.dtype != kind:
                wide.copy_(product)
            scores = torch.log_softmax(wide, -1, out=found[: len(piece)])  # a processor's goes row by row: in its place
            total -= scores.gather(1, wanted).sum()
            product.copy_(scores.exp_().scatter_add_(1, wanted, scores.new_full(wanted.shape, -1.0)).div_(count))
            for_states[start : start + chunk] = product @ narrow
            if for_weight is not None:
                add_products(for_weight, product, piece, first=start == 0)
        ctx.save_for_backward(for_states, for_weight)
        ctx.kind = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """Scale the gradients that the forward pass formed."""
        for_states, for_weight = ctx.saved_tensors
        (slope,) = slopes
        return slope * for_states, None if for_weight is None else (slope * for_weight).to(ctx.kind), None, None, None


def add_products(total: Tensor, slope: Tensor, states: Tensor, *, first: bool) -> None:
    """Add slope.T @ states to a matrix in fp32, (V, d); on a processor part by part, so that its cache holds the casts.

    Args:
        total: The matrix.
        slope: Gradient of the logits, (tokens, V).
        states: Hidden states, (tokens, d).
        first: Whether nothing has been added yet.
    """
    words = PART if total.device.type == "cpu" else len(total)
    for part, of_part in zip(torch.split(total, words), torch.split(slope, words, dim=1), strict=True):
        product = of_part.T @ states
        if first:
            part.copy_(product)
        else:
            part.add_(product)


def compute_capped_loss(states: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Return the summed cross-entropy of bounded logits."""
    return functional.cross_entropy(cap * torch.tanh(states @ weight.T / cap), targets, reduction="sum")


def compute_divergence(
    states: Tensor, weight: Tensor, known: Tensor, known_weight: Tensor, cap: float | None = None
) -> Tensor:
    """Return the mean KL divergence of a model's predictions from known ones, KL(known || model), in nats per token.

    Logits are formed chunk by chunk, and again in the backward pass.

    Args:
        states: Final hidden states of the model, (B, S, d).
        weight: Its head, (V, d).
        known: Final hidden states of the known model, (B, S, d); no gradient goes into them.
        known_weight: Its head, (V, d).
        cap: Bound of both models' logits, if there is one.
    """
    flat, other = (part.reshape(-1, part.shape[-1]).float() for part in (states, known))
    total = torch.zeros((), device=flat.device)
    for piece, target in zip(torch.split(flat, CHUNK), torch.split(other, CHUNK), strict=True):
        part = checkpoint(sum_divergence, piece, weight.float(), target, known_weight.float(), cap, use_reentrant=False)
        total = total + part
    return total / len(flat)


def sum_divergence(states: Tensor, weight: Tensor, known: Tensor, known_weight: Tensor, cap: float | None) -> Tensor:
    """Return the summed divergence of a chunk of tokens."""
    logits, wanted = states @ weight.T, known.detach() @ known_weight.detach().T
    if cap is not None:
        logits, wanted = cap * torch.tanh(logits / cap), cap * torch.tanh(wanted / cap)
    return functional.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True)


def compute_auxiliary_loss(model: nn.Module) -> Tensor | None:
    """Return the sum of what modules want minimised beside the next-token loss, or None.

    A module says so by leaving a scalar in `auxiliary`, None before, during its forward pass in training.
    """
    return sum_auxiliary(find_auxiliary_modules(model))


def find_auxiliary_modules(model: nn.Module) -> list[Any]:
    """Return the modules that may want something minimised; a walk over all of a model takes a while in every step."""
    return [module for module in model.modules() if hasattr(module, "auxiliary")]


def sum_auxiliary(modules: Sequence[Any]) -> Tensor | None:
    """Return the sum of what such modules want minimised."""
    parts = [part for module in modules if (part := module.auxiliary) is not None]
    return torch.stack(parts).sum() if parts else None


@dataclass(frozen=True)
class TokenScores:
    """Scores per token, each (num_tokens,).

    Attributes:
        nll: Negative log-likelihood in nats.
        hit: Whether the most likely token is the right one.
        rank: How many tokens are more likely than the right one; None where ranks were not asked for.
    """

    nll: Tensor
    hit: Tensor
    rank: Tensor | None = None


@torch.no_grad()
def score_states(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int = CHUNK,
    cap: float | None = None,
    *,
    ranks: bool = False,
) -> TokenScores:
    """Score every token of a batch, holding the logits of `chunk` tokens at a time, or of fewer where that is faster.

    Args:
        states: Final hidden states, (B, S, d).
        weight: Head, (V, d).
        targets: Next tokens, (B, S).
        chunk: Tokens per chunk.
        cap: Bound of the logits, if there is one.
        ranks: Whether to rank the right tokens too.
    """
    flat, labels = states.reshape(-1, states.shape[-1]).float(), targets.reshape(-1)
    nll, hit = (
        torch.empty(len(labels), device=flat.device),
        torch.empty(len(labels), dtype=torch.bool, device=flat.device),
    )
    rank = torch.empty_like(labels) if ranks else None
    chunk, weight = min(chunk, choose_chunk(weight, torch.float32), max(len(labels), 1)), weight.float()
    products, scores = flat.new_empty(2, chunk, len(weight))  # once for all chunks, as in training
    for start in range(0, len(labels), chunk):
        lines = slice(start, start + chunk)
        logits = torch.mm(flat[lines], weight.T, out=products[: len(flat[lines])])
        if cap is not None:
            logits.div_(cap).tanh_().mul_(cap)
        known = torch.log_softmax(logits, -1, out=scores[: len(logits)])
        nll[lines] = -known.gather(1, labels[lines, None])[:, 0]
        if rank is not None:
            rank[lines] = count_above(logits, labels[lines], out=known)
        hit[lines] = find_hits(logits, labels[lines])
    return TokenScores(nll, hit, rank)


def count_above(logits: Tensor, labels: Tensor, out: Tensor) -> Tensor:
    """Count for every token how many are more likely than the right one, (tokens,).

    A processor adds floating-point numbers several times faster than truth values; their sums are exact up to 2^24.

    Args:
        logits: Of every token, (tokens, V).
        labels: The right ones, (tokens,).
        out: Memory to compare in, (tokens, V) in fp32.
    """
    return torch.gt(logits, logits.gather(1, labels[:, None]), out=out).sum(-1).long()


def find_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Say of every token whether the most likely one is right, of several the first, (tokens,).

    To find the largest of the others takes a processor a fraction of what it takes to find where the largest is.

    Args:
        logits: Of every token, (tokens, V); they may be lost.
        labels: The right ones, (tokens,).
    """
    if logits.device.type != "cpu":
        return logits.argmax(-1) == labels
    wanted = labels[:, None]
    own = logits.gather(1, wanted)
    others = logits.scatter_(1, wanted, -torch.inf).amax(-1, keepdim=True)
    hit, tied = (own > others)[:, 0], (own == others)[:, 0]
    if tied.any():
        logits.scatter_(1, wanted, own)
        hit[tied] = logits[tied].argmax(-1) == labels[tied]
    return hit


def score_tokens(
    model: nn.Module, input_ids: Tensor, targets: Tensor, chunk: int = CHUNK, *, ranks: bool = False, **options: Any
) -> TokenScores:
    """Score every token of a batch by a causal LM, or by what mixes several in a way of its own (`mode.moe.ensemble`).

    Args:
        model: The model.
        input_ids: Tokens, (B, S).
        targets: Next tokens, (B, S).
        chunk: Tokens whose logits exist at one time.
        ranks: Whether to rank the right tokens too.
        options: As the decoder's.
    """
    own = getattr(model, "token_scores", None)
    with Patch(model):
        if own is not None:
            scores: TokenScores = own(input_ids, targets, chunk, ranks=ranks, **options)
            return scores
        states = compute_hidden_states(model, input_ids, **options)
    return score_states(states, output_head(model), targets, chunk, logit_softcap(model), ranks=ranks)
