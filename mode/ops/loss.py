"""Next-token loss and scores, computed chunk by chunk, so that the logits of a whole batch are never stored.

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
"""Tokens per chunk of the training loss on a CPU. For small vocabularies, torch's default is several times slower."""


HALF_CHUNK = 256
"""Tokens per chunk on a CPU where the logits of a token take more memory: for vocabularies larger than `WIDE`, and in
bf16, where logits are stored in both precisions. It is as fast as `CHUNK` there. Capped logits and the divergence of
anchored rows always use `CHUNK`."""


WIDE = 4096
"""Vocabulary size above which a CPU uses `HALF_CHUNK`."""


CUDA_CHUNK = 2048
"""Tokens per chunk on a GPU, where matrix products need more rows to be efficient."""


PART = 2048
"""Vocabulary entries for which a CPU computes and adds the head's gradient at a time."""


NATIVE = hasattr(nn, "LinearCrossEntropyOptions")
"""Whether torch has the fused linear cross-entropy, which is new in 2.13."""


def compute_hidden_states(model: nn.Module, input_ids: Tensor, **options: Any) -> Tensor:
    """Return the final hidden states of a causal LM, (B, S, d), without applying the output head.

    A modular head appends further inputs to the hidden states, to match its `wide` weight (`mode.modular.head`).

    Args:
        model: A causal LM.
        input_ids: Tokens, (B, S).
        options: Further arguments of the decoder.
    """
    backbone: Any = model.base_model
    states: Tensor = backbone(input_ids=input_ids, **{"use_cache": False} | options).last_hidden_state
    widen = getattr(model.get_output_embeddings(), "widen", None)  # type: ignore[operator]
    return states if widen is None else widen(states)


def find_head(model: nn.Module) -> Tensor:
    """Return the weight of a causal LM's output head, (V, d)."""
    embeddings: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    weight: Tensor = getattr(embeddings, "wide", embeddings.weight)
    return weight


def find_softcap(model: nn.Module) -> float | None:
    """Return the softcap c of a model whose logits are c tanh(logits / c), as in Gemma 2; None without a softcap."""
    config: Any = model.config
    cap: float | None = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return cap


def compute_next_token_loss(
    states: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None, precision: str = "fp32"
) -> Tensor:
    """Return the mean cross-entropy in nats over all tokens of a batch.

    There are three implementations:

    * In fp32, torch's fused function computes gradients chunk by chunk in the forward pass. It computes no gradient
      of a frozen head.
    * In bf16, and in releases of torch without the fused function, `ChunkedLoss` does the same. Unlike the fused
      function it accumulates in fp32 when the products are in bf16.
    * Capped logits, which the fused function does not support, are computed chunk by chunk and recomputed in the
      backward pass.

    Args:
        states: Final hidden states, (B, S, d).
        weight: Head, (V, d).
        targets: Next tokens, (B, S).
        cap: Softcap of the logits, or None. Capped logits are in fp32.
        precision: Precision of the matrix products, `fp32` or `bf16`. All other operations are in fp32.
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
    for piece, target in zip(torch.split(flat, CHUNK), torch.split(labels, CHUNK), strict=True):
        total = total + checkpoint(compute_capped_loss, piece, weight.float(), target, cap, use_reentrant=False)
    return total / len(labels)


def choose_chunk(weight: Tensor, kind: torch.dtype) -> int:
    """Return the number of tokens per chunk for a head, (V, d). The choices follow from measured times."""
    if weight.device.type == "cuda":
        return CUDA_CHUNK
    return HALF_CHUNK if kind == torch.bfloat16 or len(weight) > WIDE else CHUNK


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy with matrix products in bf16 or fp32, and with sums and softmax in fp32.

    Like torch's fused function, it computes gradients chunk by chunk in the forward pass. On a CPU with bf16
    instructions, the fused function is slower in bf16 than in fp32, and its loss has only the three digits of bf16.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, kind: torch.dtype, chunk: int) -> Tensor:
        """Return the loss.

        Args:
            ctx: Context of autograd.
            states: Final hidden states, (tokens, d).
            weight: Head, (V, d).
            targets: Next tokens, (tokens,).
            kind: Data type of the matrix products.
            chunk: Tokens per chunk.
        """
        narrow, count = weight.to(kind), len(targets)
        for_states = torch.empty_like(states)
        for_weight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=states.device)
        # All chunks reuse the same buffers: on a CPU, the system maps a new large buffer page by page.
        products = narrow.new_empty(min(chunk, count), len(weight))
        logits = products if kind == torch.float32 else torch.empty_like(products, dtype=torch.float32)
        softmax = logits if logits.device.type == "cpu" else torch.empty_like(logits)
        for start in range(0, count, chunk):
            piece = states[start : start + chunk].to(kind)
            labels = targets[start : start + chunk, None]
            product, wide = products[: len(piece)], logits[: len(piece)]
            torch.mm(piece, narrow.T, out=product)
            if wide.dtype != kind:
                wide.copy_(product)
            scores = torch.log_softmax(wide, -1, out=softmax[: len(piece)])  # in place on a CPU, which goes row by row
            total -= scores.gather(1, labels).sum()
            product.copy_(scores.exp_().scatter_add_(1, labels, scores.new_full(labels.shape, -1.0)).div_(count))
            for_states[start : start + chunk] = product @ narrow
            if for_weight is not None:
                add_products(for_weight, product, piece, first=start == 0)
        ctx.save_for_backward(for_states, for_weight)
        ctx.kind = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """Scale the gradients that the forward pass computed."""
        for_states, for_weight = ctx.saved_tensors
        (grad,) = grads
        return grad * for_states, None if for_weight is None else (grad * for_weight).to(ctx.kind), None, None, None


def add_products(total: Tensor, grad: Tensor, states: Tensor, *, first: bool) -> None:
    """Add grad.T @ states to an fp32 matrix. On a CPU this is done in parts, so that the casts fit in the cache.

    Args:
        total: The matrix, (V, d).
        grad: Gradient of the logits, (tokens, V).
        states: Hidden states, (tokens, d).
        first: Whether to overwrite the matrix, which is uninitialised before the first chunk.
    """
    size = PART if total.device.type == "cpu" else len(total)
    for part, part_grad in zip(torch.split(total, size), torch.split(grad, size, dim=1), strict=True):
        product = part_grad.T @ states
        if first:
            part.copy_(product)
        else:
            part.add_(product)


def compute_capped_loss(states: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Return the cross-entropy of capped logits, summed over tokens."""
    return functional.cross_entropy(cap * torch.tanh(states @ weight.T / cap), targets, reduction="sum")


def compute_divergence(
    states: Tensor, weight: Tensor, known: Tensor, known_weight: Tensor, cap: float | None = None
) -> Tensor:
    """Return the mean KL divergence of a model's predictions from a reference's, KL(known || model), in nats per token.

    Logits are computed chunk by chunk and recomputed in the backward pass.

    Args:
        states: Final hidden states of the model, (B, S, d).
        weight: Head of the model, (V, d).
        known: Final hidden states of the reference model, (B, S, d). They receive no gradient.
        known_weight: Head of the reference model, (V, d).
        cap: Softcap of both models' logits, or None.
    """
    flat, other = (part.reshape(-1, part.shape[-1]).float() for part in (states, known))
    total = torch.zeros((), device=flat.device)
    for piece, target in zip(torch.split(flat, CHUNK), torch.split(other, CHUNK), strict=True):
        part = checkpoint(sum_divergence, piece, weight.float(), target, known_weight.float(), cap, use_reentrant=False)
        total = total + part
    return total / len(flat)


def sum_divergence(states: Tensor, weight: Tensor, known: Tensor, known_weight: Tensor, cap: float | None) -> Tensor:
    """Return the KL divergence of a chunk of tokens, summed over tokens."""
    logits, reference = states @ weight.T, known.detach() @ known_weight.detach().T
    if cap is not None:
        logits, reference = cap * torch.tanh(logits / cap), cap * torch.tanh(reference / cap)
    return functional.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), reduction="sum", log_target=True)


def find_auxiliary_modules(model: nn.Module) -> list[Any]:
    """Return the modules that may have an auxiliary loss. Searching a whole model in every step would be slow.

    A module with an auxiliary loss has it, a scalar, in its attribute `auxiliary` after every forward pass in training.
    The attribute is None otherwise.
    """
    return [module for module in model.modules() if hasattr(module, "auxiliary")]


def sum_auxiliary(modules: Sequence[Any]) -> Tensor | None:
    """Return the sum of the auxiliary losses of modules, or None if there are none."""
    parts = [part for module in modules if (part := module.auxiliary) is not None]
    return torch.stack(parts).sum() if parts else None


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of a batch, each (num_tokens,).

    Attributes:
        nll: Negative log-likelihood in nats.
        hit: Whether the right token was the most likely one.
        rank: Number of tokens that are more likely than the right one; None where ranks were not asked for.
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
    """Score every token of a batch, with the logits of one chunk of tokens in memory.

    Logits are computed in fp32, also under autocast, which leaves calls with a given output alone: logits in bf16 would
    have ties.

    Args:
        states: Final hidden states, (B, S, d).
        weight: Head, (V, d).
        targets: Next tokens, (B, S).
        chunk: Most tokens per chunk; fewer are used where that is faster.
        cap: Softcap of the logits, or None.
        ranks: Whether to rank the right tokens too.
    """
    flat, labels = states.reshape(-1, states.shape[-1]).float(), targets.reshape(-1)
    nll, hit = (
        torch.empty(len(labels), device=flat.device),
        torch.empty(len(labels), dtype=torch.bool, device=flat.device),
    )
    rank = torch.empty_like(labels) if ranks else None
    chunk, weight = min(chunk, choose_chunk(weight, torch.float32), max(len(labels), 1)), weight.float()
    products, scores = flat.new_empty(2, chunk, len(weight))  # buffers that all chunks reuse, as in training
    for start in range(0, len(labels), chunk):
        tokens = slice(start, start + chunk)
        logits = torch.mm(flat[tokens], weight.T, out=products[: len(flat[tokens])])
        if cap is not None:
            logits.div_(cap).tanh_().mul_(cap)
        log_probabilities = torch.log_softmax(logits, -1, out=scores[: len(logits)])
        nll[tokens] = -log_probabilities.gather(1, labels[tokens, None])[:, 0]
        if rank is not None:
            rank[tokens] = count_above(logits, labels[tokens], out=log_probabilities)
        hit[tokens] = find_hits(logits, labels[tokens])
    return TokenScores(nll, hit, rank)


def count_above(logits: Tensor, labels: Tensor, out: Tensor) -> Tensor:
    """Count, for every token, the tokens that are more likely than the right one, (num_tokens,).

    Sums of fp32 are several times faster on a processor than sums of booleans, and exact up to 2^24.

    Args:
        logits: Logits of every token, (num_tokens, V).
        labels: The right tokens, (num_tokens,).
        out: Buffer for the comparison, (num_tokens, V) in fp32.
    """
    return torch.gt(logits, logits.gather(1, labels[:, None]), out=out).sum(-1).long()


def find_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for every token whether the label has the largest logit, (tokens,). Among equal logits the first counts.

    On a CPU, the largest logit of the other tokens is compared with the label's: a maximum is faster than an argmax.

    Args:
        logits: Logits, (tokens, V). The function may overwrite them.
        labels: Correct tokens, (tokens,).
    """
    if logits.device.type != "cpu":
        return logits.argmax(-1) == labels
    columns = labels[:, None]
    own = logits.gather(1, columns)
    others = logits.scatter_(1, columns, -torch.inf).amax(-1, keepdim=True)
    hit, tied = (own > others)[:, 0], (own == others)[:, 0]
    if tied.any():
        logits.scatter_(1, columns, own)
        hit[tied] = logits[tied].argmax(-1) == labels[tied]
    return hit


def score_tokens(
    model: nn.Module, input_ids: Tensor, targets: Tensor, chunk: int = CHUNK, *, ranks: bool = False, **options: Any
) -> TokenScores:
    """Score every token of a batch with a causal LM or an ensemble.

    A model with its own method `score_tokens` is scored by that method (`mode.moe.ensemble`).

    Args:
        model: The model.
        input_ids: Tokens, (B, S).
        targets: Next tokens, (B, S).
        chunk: Most tokens whose logits are in memory at one time.
        ranks: Whether to rank the right tokens too.
        options: Further arguments of the decoder.
    """
    score = getattr(model, "score_tokens", None)
    with Patch(model):
        if score is not None:
            scores: TokenScores = score(input_ids, targets, chunk, ranks=ranks, **options)
            return scores
        states = compute_hidden_states(model, input_ids, **options)
    return score_states(states, find_head(model), targets, chunk, find_softcap(model), ranks=ranks)
