"""Score the tokens of a split, without ever holding all logits. `mode.records.metrics` declares the metrics."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
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
    tokens: int | None = None,
    probe: Callable[[int], None] = lambda count: None,
) -> Score:
    """Return the score of a split (`score_stream`, `summarise`). Beginning-of-sequence tokens do not count.

    Args:
        model: A causal LM.
        split: The packed split.
        sequence_length: Tokens per row.
        batch_size: Rows per forward pass, at most.
        chunk: Tokens whose logits exist at one time.
        tokens: Number of tokens after which no further row is scored (`choose_rows`); None scores all.
        probe: Called after every forward pass with the number of its tokens that count.
    """
    rows = choose_rows(split, sequence_length, tokens)
    values = score_stream(
        model, split, sequence_length=sequence_length, batch_size=batch_size, chunk=chunk, rows=rows, probe=probe
    )
    return summarise(values, split, find_positions(rows, sequence_length, len(split.tokens) - 1))


def choose_rows(split: PackedSplit, sequence_length: int, tokens: int | None) -> NDArray[np.int64]:
    """Return the numbers of the rows to score, in order.

    A row of S tokens is chosen by the hash of its content, so the choice depends on no method, and nearly all
    documents of a split have a part in it: (num_rows,).

    Args:
        split: The packed split.
        sequence_length: Tokens per row, S.
        tokens: Number of tokens after which no further row is chosen; None chooses all.
    """
    count = -(-(len(split.tokens) - 1) // sequence_length)
    chosen = count if tokens is None else min(count, -(-tokens // sequence_length))
    if chosen == count:
        return np.arange(count)
    edges = sequence_length * np.arange(count + 1)
    contents = (np.asarray(split.tokens[1:][start:stop], "<u4") for start, stop in pairwise(edges))
    digests = [hashlib.sha256(content.tobytes()).digest() for content in contents]
    return np.sort(np.array(sorted(range(count), key=digests.__getitem__)[:chosen]))


def find_positions(rows: NDArray[np.int64], sequence_length: int, num_scored: int) -> NDArray[np.int64]:
    """Return the positions of the tokens of rows in a stream of `num_scored` tokens, in order.

    >>> find_positions(np.array([0, 2]), 2, 5).tolist()
    [0, 1, 4]
    """
    positions = (rows[:, None] * sequence_length + np.arange(sequence_length)).ravel()
    return positions[positions < num_scored]


@torch.no_grad()
def score_stream(
    model: nn.Module,
    split: PackedSplit,
    *,
    sequence_length: int,
    batch_size: int,
    chunk: int,
    rows: NDArray[np.int64] | None = None,
    probe: Callable[[int], None] = lambda count: None,
) -> TokenValues:
    """Score every token of the rows of a split, each once, in order: (num_scored,).

    Rows are consecutive windows that overlap by one token, so the tokens scored do not depend on the method, and a
    token's context is at most the `sequence_length` tokens before it in the stream. The first token of a split is not
    scored. If documents begin with a beginning-of-sequence token, it replaces the first input of every row.

    The last, shorter row is padded; padding comes after the tokens that count and is not scored. Several processes
    share the rows.

    Args:
        model: A causal LM.
        split: The packed split.
        sequence_length: Tokens per row.
        batch_size: Rows per forward pass, at most.
        chunk: Tokens whose logits exist at one time.
        rows: Numbers of the rows, in order; None for all.
        probe: Called after every forward pass with the number of its tokens that count.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    rows = choose_rows(split, sequence_length, None) if rows is None else rows
    num_scored = len(find_positions(rows, sequence_length, len(split.tokens) - 1))
    nll, hit = np.zeros(num_scored, np.float64), np.zeros(num_scored, np.bool_)
    rank = np.zeros(num_scored, np.int64)
    size = choose_rows_per_pass(device, batch_size, sequence_length)
    starts = range(0, len(rows), size)
    shared = len(starts) >= processes.world_size()  # then every process has rows, and its probe sees some
    for first in starts[processes.rank() :: processes.world_size()] if shared else starts:
        start, stop = first * sequence_length, min(num_scored, (first + size) * sequence_length)
        inputs, targets = read_rows(split, rows[first : first + size], sequence_length)
        scores = score_tokens(model, inputs.to(device), targets.to(device), chunk, ranks=True)
        assert scores.rank is not None
        nll[start:stop] = scores.nll[: stop - start].double().cpu().numpy()
        hit[start:stop] = scores.hit[: stop - start].cpu().numpy()
        rank[start:stop] = scores.rank[: stop - start].cpu().numpy()
        probe(stop - start)
    model.train(was_training)
    values = TokenValues(nll, hit, rank)
    return add_processes(values) if shared else values


def add_processes(values: TokenValues) -> TokenValues:
    """Return the sum over processes of values of which each process has its rows, and zeros elsewhere."""
    nll, hit, rank = (
        processes.all_reduce_sum(torch.from_numpy(each.astype(np.float64))).numpy()
        for each in (values.nll, values.hit, values.rank)
    )
    return TokenValues(nll, hit > 0, rank.astype(np.int64))


def read_rows(split: PackedSplit, rows: NDArray[np.int64], sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs and targets of rows of a split, (num_rows, sequence_length) each; zeros pad the last row.

    >>> stream = PackedSplit(np.arange(1, 6), np.array([0, 5]), 5, bos=9)
    >>> [part.tolist() for part in read_rows(stream, np.array([0, 1]), 3)]
    [[[9, 2, 3], [9, 5, 0]], [[2, 3, 4], [5, 0, 0]]]
    """
    windows = np.zeros((len(rows), sequence_length + 1), np.int64)
    for window, row in zip(windows, rows, strict=True):
        tokens = split.tokens[row * sequence_length : (row + 1) * sequence_length + 1]
        window[: len(tokens)] = tokens
    both = torch.from_numpy(windows)
    inputs, targets = both[:, :-1].clone(), both[:, 1:].clone()
    if split.bos is not None:
        inputs[:, 0] = split.bos
    return inputs, targets


def summarise(tokens: TokenValues, split: PackedSplit, positions: NDArray[np.int64] | None = None) -> Score:
    """Turn per-token values into a split's score.

    Sums of fractions over documents are rounded to three decimals; the numbers of the metrics are not. The bytes of a
    part of a split are those of the split times its share of the tokens.

    Args:
        tokens: Values of the scored tokens.
        split: The packed split.
        positions: Positions of the scored tokens, counted from the split's second token; None for all.
    """
    counted = np.ones(len(split.tokens) - 1, np.bool_) if split.bos is None else split.tokens[1:] != split.bos
    chosen = np.full_like(counted, positions is None)
    if positions is not None:
        chosen[positions] = True
    kept = counted & chosen
    ours = kept[chosen]
    tokens = TokenValues(nll=tokens.nll[ours], hit=tokens.hit[ours], rank=tokens.rank[ours])
    num_bytes = round(split.num_bytes * int(kept.sum()) / int(counted.sum()))
    # The stream's first token has no context and is not scored, so document 0 has one token fewer.
    edges = np.concatenate([[0], np.cumsum(kept)])[np.maximum(split.starts - 1, 0)]
    counts = {"token": len(tokens.nll), "byte": num_bytes}
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
        bytes=num_bytes,
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
