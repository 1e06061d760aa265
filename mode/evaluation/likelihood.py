"""Log-likelihoods of many short texts. Several whole texts share a row, and no text attends to another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mode.core.device import choose_rows_per_pass
from mode.ops.loss import score_tokens


@dataclass(frozen=True)
class Text:
    """A text of which the last tokens are scored.

    Attributes:
        tokens: Tokens of the text.
        given: Number of first tokens that are not scored, at least one.
    """

    tokens: Sequence[int]
    given: int = 1


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of the scored tokens of a text.

    Attributes:
        total: Sum of the tokens' log-likelihoods in nats.
        greedy: Whether every scored token was the most likely one.
    """

    total: float
    greedy: bool


@torch.no_grad()
def compute_log_likelihoods(
    model: nn.Module,
    texts: Sequence[Text],
    *,
    row: int,
    batch_size: int,
    done: Callable[[int], None] = lambda number: None,
) -> list[Likelihood]:
    """Score texts, packed into rows without padding between them.

    Position ids restart at every text. From them `transformers` builds masks under which no text attends to another. A
    model that reads earlier tokens by other means than attention (`looks_back`), such as a gate over the mean of the
    prefix, gets one row per text.

    Args:
        model: A causal LM in evaluation mode.
        texts: The texts, each of at least two tokens.
        row: Tokens per row. A longer text gets a longer row.
        batch_size: Most rows per forward pass.
        done: Called after every forward pass with the number of texts scored so far.

    Returns:
        One likelihood per text, in the order of the texts.
    """
    device = next(model.parameters()).device
    if any(getattr(module, "looks_back", False) for module in model.modules()):
        row = 1
    rows = pack_texts([len(text.tokens) - 1 for text in texts], row)
    batch_size = choose_rows_per_pass(device, batch_size, row)
    results: dict[int, Likelihood] = {}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        inputs, targets, positions = (part.to(device) for part in lay_out_rows(texts, batch))
        scores = score_tokens(model, inputs, targets, position_ids=positions)
        nll, hit = (part.view(inputs.shape).cpu() for part in (scores.nll, scores.hit))
        for line, members in enumerate(batch):
            end = 0
            for index in members:
                begin, end = end, end + len(texts[index].tokens) - 1
                scored = slice(begin + texts[index].given - 1, end)
                total = -float(nll[line, scored].double().sum())
                results[index] = Likelihood(total, bool(hit[line, scored].all()))
        done(len(results))
    return [results[index] for index in range(len(texts))]


def pack_texts(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Assign texts to rows: longest text first, each to the first row with enough room (first-fit decreasing).

    Args:
        lengths: Lengths of the texts.
        row: Tokens per row. A longer text gets a row of its own length.

    Returns:
        For each row, the indices of its texts.

    >>> pack_texts([3, 7, 5, 2], 10)
    [[1, 0], [2, 3]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fits = next((number for number, free in enumerate(room) if free >= lengths[index]), None)
        if fits is None:
            rows.append([])
            room.append(max(row, lengths[index]))
            fits = len(rows) - 1
        rows[fits].append(index)
        room[fits] -= lengths[index]
    return rows


def lay_out_rows(texts: Sequence[Text], rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs, targets and position ids of rows of texts, each (rows, longest row).

    Inputs and targets are padded with zeros at the end of a row. The padding has positions of its own, like a text.
    """
    longest = max(sum(len(texts[index].tokens) - 1 for index in members) for members in rows)
    inputs, targets, positions = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
    for line, members in enumerate(rows):
        end = 0
        for index in members:
            tokens = torch.tensor(texts[index].tokens)
            begin, end = end, end + len(tokens) - 1
            inputs[line, begin:end], targets[line, begin:end] = tokens[:-1], tokens[1:]
            positions[line, begin:end] = torch.arange(end - begin)
        positions[line, end:] = torch.arange(longest - end)
    return inputs, targets, positions
