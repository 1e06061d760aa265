"""Next-token accuracy, loss and bits per byte over a whole split, without ever holding all logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mode.core import processes
from mode.core.device import choose_rows_per_pass
from mode.core.errors import ConfigError
from mode.data.pack import PackedSplit
from mode.ops.loss import score_tokens


@dataclass(frozen=True)
class Score:
    """Score of a model on one split of one domain.

    Attributes:
        accuracy: Share of tokens whose most likely prediction is right (next-token top-1 accuracy).
        stderr: Standard error of the accuracy, clustered by document; None with a single document.
        loss: Mean negative log-likelihood, nats per token.
        bits_per_byte: Negative log-likelihood in bits over the UTF-8 bytes of the text.
        tokens: Tokens scored.
        document_tokens: Tokens scored in each document.
        document_hits: Tokens predicted right in each document.
    """

    accuracy: float
    stderr: float | None
    loss: float
    bits_per_byte: float
    tokens: int
    document_tokens: tuple[int, ...]
    document_hits: tuple[int, ...]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: PackedSplit,
    *,
    sequence_length: int,
    batch_size: int,
    chunk: int,
    probe: Callable[[int], None] = lambda count: None,
) -> Score:
    """Score every token of a split but its first, each once.

    Rows are consecutive windows that overlap by one token, so the tokens scored do not depend on the method, and a
    token's context is at most the `sequence_length` tokens before it in the stream. The last, shorter row is padded;
    padding comes after the tokens that count and is not scored. Several processes share the rows.

    Args:
        model: A causal LM.
        split: The packed split, num_tokens long.
        sequence_length: Tokens per row.
        batch_size: Rows per forward pass, at most.
        chunk: Tokens whose logits exist at one time.
        probe: Called after every forward pass with the number of its tokens that count.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    num_scored = len(split.tokens) - 1
    nll, hit = np.zeros(num_scored, np.float64), np.zeros(num_scored, np.bool_)
    tokens = choose_rows_per_pass(device, batch_size, sequence_length) * sequence_length
    starts = range(0, num_scored, tokens)
    shared = len(starts) >= processes.world_size()  # then every process has some, and its probe something to tell
    for start in starts[processes.rank() :: processes.world_size()] if shared else starts:
        stop = min(num_scored, start + tokens)
        stream = torch.from_numpy(np.asarray(split.tokens[start : stop + 1], np.int64)).to(device)
        inputs, targets = fold_rows(stream[:-1], sequence_length), fold_rows(stream[1:], sequence_length)
        scores = score_tokens(model, inputs, targets, chunk)
        nll[start:stop] = scores.nll[: stop - start].double().cpu().numpy()
        hit[start:stop] = scores.hit[: stop - start].cpu().numpy()
        probe(stop - start)
    model.train(was_training)
    if shared:
        nll, hit = (processes.all_reduce_sum(torch.from_numpy(each.astype(np.float64))).numpy() for each in (nll, hit))
    return summarise(nll, hit > 0, split)


def fold_rows(stream: torch.Tensor, sequence_length: int) -> torch.Tensor:
    """Fold a stream into rows, padding the last with zeros.

    >>> fold_rows(torch.arange(1, 6), 3).tolist()
    [[1, 2, 3], [4, 5, 0]]
    """
    padding = -len(stream) % sequence_length
    return torch.nn.functional.pad(stream, (0, padding)).view(-1, sequence_length)


def summarise(nll: NDArray[np.float64], hit: NDArray[np.bool_], split: PackedSplit) -> Score:
    """Turn per-token scores into a split's score.

    The standard error is that of a ratio of sums over documents (linearised), since tokens of one document are not
    independent.
    """
    # The stream's first token has no context and is not scored, so document 0 has one token fewer.
    edges = np.maximum(split.starts - 1, 0)
    sums = np.concatenate([[0], np.cumsum(hit)])
    hits, tokens = np.diff(sums[edges]), np.diff(edges)
    accuracy = float(hits.sum() / tokens.sum())
    count = len(tokens)
    spread = float(((hits - accuracy * tokens) ** 2).sum())
    stderr = math.sqrt(spread * count / max(1, count - 1)) / float(tokens.sum()) if count > 1 else None
    return Score(
        accuracy=accuracy,
        stderr=stderr,
        loss=float(nll.mean()),
        bits_per_byte=float(nll.sum() / math.log(2) / split.num_bytes),
        tokens=len(nll),
        document_tokens=tuple(int(count) for count in tokens),
        document_hits=tuple(int(count) for count in hits),
    )


def flatten_scores(scores: dict[str, Score]) -> dict[str, Any]:
    """Flatten validation scores into a point of the training curve."""
    point: dict[str, Any] = {}
    for name, score in scores.items():
        point[f"validation/{name}/accuracy"] = score.accuracy
        point[f"validation/{name}/loss"] = score.loss
    return point


def check_finite(scores: Mapping[str, Score]) -> None:
    """Refuse to record a model that diverged in its last steps."""
    for name, value in scores.items():
        if not math.isfinite(value.loss):
            raise ConfigError(f"the trained model's loss on {name} is {value.loss}; try a lower train.lr")
