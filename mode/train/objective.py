"""What a training step minimises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mode.config.train import Train
from mode.core.device import send
from mode.core.errors import ConfigError
from mode.ops.loss import (
    compute_divergence,
    compute_hidden_states,
    compute_next_token_loss,
    find_auxiliary_modules,
    logit_softcap,
    output_head,
    sum_auxiliary,
)
from mode.train.precision import autocast, choose_precision


@dataclass(frozen=True)
class AnchorTerm:
    """How a model is held to its backbone on some rows.

    Attributes:
        weight: Factor on KL(backbone || model) beside the cross-entropy of the other rows.
        held: Which rows of a step are such rows, (B,).
        reference: What the backbone says of rows of tokens: its final hidden states, and its head. It is given the
            model that trains, which may have the backbone in it.
        always: Whether it is asked in every micro-batch, about a row that is not held where none is: what it says may
            take all processes, some of which have rows that are held.
    """

    weight: float
    held: Callable[[int], NDArray[np.bool_]]
    reference: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    always: bool = False


class Objective(nn.Module):
    """A model with what it minimises, so that one forward pass is all of a micro-batch: what DDP needs."""

    def __init__(
        self,
        model: nn.Module,
        settings: Train,
        hold: AnchorTerm | None,
        part: Callable[[Tensor], Tensor] = lambda rows: rows,
        end: int | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: A causal LM.
            settings: The loop's.
            hold: How it is held to its backbone; None where it is not.
            part: Returns the rows whose hidden states come out of the model, of all that go in.
            end: Token that closes a document, where documents of a row do not see each other.

        Raises:
            ConfigError: Documents are not to see each other, and something but attention looks back in a row.
        """
        super().__init__()
        self.model, self.settings, self.hold, self.part = model, settings, hold, part
        self.precision = choose_precision(settings, model)
        self.wanting, self.end = find_auxiliary_modules(model), end
        if end is not None and (hold or any(getattr(module, "looks_back", False) for module in model.modules())):
            raise ConfigError(
                "train.batch.intra_document_masking=true: neither with an anchor nor where a gate or a judge sees the "
                "whole prefix"
            )

    def around(self, model: nn.Module) -> Objective:
        """Return the same objective of another model, whose layers all processes gather in every micro-batch."""
        hold = self.hold and replace(self.hold, always=True)
        return Objective(model, self.settings, hold, end=self.end)

    def forward(
        self, rows: Tensor, held: Tensor | None = None, kinds: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the loss of a micro-batch, what modules ask for beside it, and the hidden states, (B, S, d).

        Args:
            rows: Tokens, (B, S + 1).
            held: Which rows are held to the backbone, (B,), in the processor's memory.
            kinds: Of what kind each row is, (B,), where modules want to know.
        """
        model, device = self.model, rows.device
        if kinds is not None:
            set_row_kinds(model, kinds)
        with autocast(self.precision, device):
            places = {} if self.end is None else {"position_ids": compute_positions(rows[:, :-1], self.end)}
            states = compute_hidden_states(model, rows[:, :-1], **places)
        if self.hold is None or held is None:
            loss = compute_next_token_loss(
                states, output_head(model), self.part(rows[:, 1:]), logit_softcap(model), self.precision
            )
        else:
            asked = select_rows(rows, held) if held.any() or not self.hold.always else rows[:1]
            with torch.no_grad(), autocast(self.precision, device):
                known = self.hold.reference(model, asked[:, :-1]) if len(asked) else None
            loss = compute_anchored_loss(model, states, rows, held, known, self.hold.weight, self.precision)
        return loss, sum_auxiliary(self.wanting), states


def compute_positions(rows: Tensor, end: int) -> Tensor:
    """Return positions that begin anew after every token that closes a document, (B, S) to (B, S).

    `transformers` makes masks of them that are blind across documents.

    >>> compute_positions(torch.tensor([[5, 9, 6, 7, 9, 8]]), end=9).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """
    index = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    begins = torch.cat([torch.zeros_like(rows[:, :1], dtype=torch.bool), rows[:, :-1] == end], dim=1)
    return index - torch.where(begins, index, 0).cummax(dim=1).values


UNKNOWN = -1
"""Kind of a row of none of the sources that were trained on."""


def set_row_kinds(model: nn.Module, kinds: Tensor) -> None:
    """Tell every module that wants to know of what kind the rows of the next forward pass are, (B,), or all, (1,)."""
    for module in model.modules():
        if hasattr(module, "row_kinds"):
            module.row_kinds = kinds


def compute_anchored_loss(
    model: nn.Module,
    states: Tensor,
    rows: Tensor,
    held: Tensor,
    known: tuple[Tensor, Tensor] | None,
    weight: float,
    precision: str,
) -> Tensor:
    """Return the mean over a micro-batch's tokens: cross-entropy of free rows, weighted divergence of held ones.

    Args:
        model: The model that trains.
        states: Its final hidden states, (B, S, d).
        rows: Tokens, (B, S + 1).
        held: Which rows are held to the backbone, (B,), in the processor's memory.
        known: The backbone's final hidden states on those, (held rows, S, d), and its head, (V, d); without such rows
            they do not matter.
        weight: Factor on their divergence.
        precision: Of the cross-entropy's products of matrices.
    """
    loss, cap = torch.zeros((), device=states.device), logit_softcap(model)
    free, count = ~held, len(rows)
    if free.any():
        mine, targets = select_rows(states, free), select_rows(rows, free)[:, 1:]
        loss = loss + compute_next_token_loss(mine, output_head(model), targets, cap, precision) * (free.sum() / count)
    if known is not None and held.any():
        loss = loss + weight * compute_divergence(select_rows(states, held), output_head(model), *known, cap) * (
            held.sum() / count
        )
    return loss


def select_rows(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the rows of values, (B, ...), that are chosen, (B,): in the processor's memory, so that nothing waits."""
    return values[send(chosen.nonzero()[:, 0], values.device)]
