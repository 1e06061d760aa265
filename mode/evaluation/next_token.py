"""Score every token of a whole split, without ever holding all logits. `mode.records.metrics` declares the metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from mode.core import processes
from mode.core.device import choose_rows_per_pass
from mode.core.errors import ConfigError
from mode.data.pack import PackedSplit
from mode.ops.loss import score_tokens
from mode.records.metrics import ACCURACY, METRICS, TokenValues
from mode.records.score import Score, compute_error


def evaluate(
    model: nn.Module,
    split: PackedSplit,
    *,
    sequence_length: int,
    batch_size: int,
    chunk: int,
    probe: Callable[[int], None] = lambda count: None,
) -> Score:
    """Return the score of a split (`score_stream`, `summarise`). Beginning-of-sequence tokens do not count."""
    values = score_stream(
        model, split, sequence_length=sequence_length, batch_size=batch_size, chunk=chunk, probe=probe
    )
    return summarise(values, split)


@torch.no_grad()
def score_stream(
    model: nn.Module,
    split: PackedSplit,
    *,
    sequence_length: int,
    batch_size: int,
    chunk: int,
    probe: Callable[[int], None] = lambda count: None,
) -> TokenValues:
    """Score every token of a split but its first, each once, in order: (num_tokens - 1,).

    If documents begin with a beginning-of-sequence token, it replaces the first input of every row.

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
    rank = np.zeros(num_scored, np.int64)
    tokens = choose_rows_per_pass(device, batch_size, sequence_length) * sequence_length
    starts = range(0, num_scored, tokens)
    shared = len(starts) >= processes.world_size()  # then every process has rows, and its probe sees some
    for start in starts[processes.rank() :: processes.world_size()] if shared else starts:
        stop = min(num_scored, start + tokens)
        stream = torch.from_numpy(np.asarray(split.tokens[start : stop + 1], np.int64)).to(device)
        inputs, targets = make_rows(stream, sequence_length, split.bos)
        scores = score_tokens(model, inputs, targets, chunk, ranks=True)
        nll[start:stop] = scores.nll[: stop - start].double().cpu().numpy()
        hit[start:stop] = scores.hit[: stop - start].cpu().numpy()
        assert scores.rank is not None
        rank[start:stop] = scores.rank[: stop - start].cpu().numpy()
        probe(stop - start)
    model.train(was_training)
    if shared:
        nll, hit, rank = (
            processes.all_reduce_sum(torch.from_numpy(each.astype(np.float64))).numpy() for each in (nll, hit, rank)
        )
    return TokenValues(nll, hit > 0, rank.astype(np.int64))


def make_rows(stream: torch.Tensor, sequence_length: int, bos: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs and targets of a stream's rows. With `bos`, it is the first input of every row.

    >>> [part.tolist() for part in make_rows(torch.arange(1, 6), 2, bos=9)]
    [[[9, 2], [9, 4]], [[2, 3], [4, 5]]]
    """
    inputs, targets = fold_rows(stream[:-1], sequence_length), fold_rows(stream[1:], sequence_length)
    if bos is not None:
        inputs = inputs.clone()  # not the stream, whose tokens are targets too
        inputs[:, 0] = bos
    return inputs, targets


def fold_rows(stream: torch.Tensor, sequence_length: int) -> torch.Tensor:
    """Fold a stream into rows, padding the last with zeros.

    >>> fold_rows(torch.arange(1, 6), 3).tolist()
    [[1, 2, 3], [4, 5, 0]]
    """
    padding = -len(stream) % sequence_length
    return torch.nn.functional.pad(stream, (0, padding)).view(-1, sequence_length)


def summarise(tokens: TokenValues, split: PackedSplit) -> Score:
    """Turn per-token values into a split's score.

    Sums of fractions over documents are rounded to three decimals; the numbers of the metrics are not.
    """
    # The stream's first token has no context and is not scored, so document 0 has one token fewer.
    edges = np.maximum(split.starts - 1, 0)
    if split.bos is not None:
        scored = np.asarray(split.tokens[1:]) != split.bos
        edges = np.concatenate([[0], np.cumsum(scored)])[edges]
        tokens = TokenValues(*(values[scored] for values in (tokens.nll, tokens.hit, tokens.rank)))
    counts = {"token": len(tokens.nll), "byte": split.num_bytes}
    numbers: dict[str, float] = {}
    sums: dict[str, tuple[float, ...]] = {}
    for metric in METRICS.values():
        values = metric.value(tokens)
        numbers[metric.key] = float(values.sum() / metric.divisor / counts[metric.per])
        if metric.sums not in sums:
            each = np.diff(np.concatenate([[0], np.cumsum(values)])[edges])
            sums[metric.sums] = tuple(each.round(3).tolist() if each.dtype.kind == "f" else each.tolist())
    document_tokens = tuple(int(count) for count in np.diff(edges))
    return Score(
        values=numbers,
        stderr=compute_error(sums[ACCURACY.sums], document_tokens),
        tokens=len(tokens.nll),
        bytes=split.num_bytes,
        document_tokens=document_tokens,
        document_sums=sums,
    )


def flatten_scores(scores: Mapping[str, Score], split: str = "validation") -> dict[str, float]:
    """Flatten the scores of a split, as points of the training curve and trackers have them."""
    return {f"{split}/{name}/{key}": value for name, score in scores.items() for key, value in score.values.items()}


def check_finite(scores: Mapping[str, Score], *, trained: bool) -> None:
    """Refuse to record a model that diverged in its last steps, or whose weights give no finite loss.

    Raises:
        ConfigError: A loss is not finite.
    """
    for name, value in scores.items():
        if not math.isfinite(value.loss):
            advice = "try a lower train.lr" if trained else "nothing was trained, so it is the weights: check them"
            raise ConfigError(f"the model's loss on {name} is {value.loss}; {advice}")
