"""The objective of a training step: cross-entropy, with weights of tokens or the divergence on anchored rows.

Shapes: B rows, S tokens per row, d hidden size, V vocabulary size.
"""

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
    find_head,
    find_softcap,
    sum_auxiliary,
)
from mode.ops.weighted_loss import compute_weighted_loss
from mode.train.precision import autocast, choose_precision
from mode.train.step_batch import StepBatch


@dataclass(frozen=True)
class AnchorTerm:
    """The term that keeps a model close to its backbone on anchored rows.

    Attributes:
        weight: Factor on KL(backbone || model), against the cross-entropy of the free rows.
        anchored: Returns which rows of a step are anchored, (B,), boolean.
        reference: Returns the backbone's final hidden states, (B, S, d), and its head, (V, d), for rows of tokens,
            (B, S). The first argument is the model that trains, which may contain the backbone.
        always: Whether the reference runs in every micro-batch, on one free row where no row is anchored. Needed where
            all processes take part in the reference and only some of them have anchored rows.
    """

    weight: float
    anchored: Callable[[int], NDArray[np.bool_]]
    reference: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    always: bool = False


class Objective(nn.Module):
    """A model with its objective: one forward pass returns the loss of a micro-batch, as DDP and FSDP require."""

    def __init__(
        self,
        model: nn.Module,
        settings: Train,
        anchor: AnchorTerm | None,
        select_loss_rows: Callable[[Tensor], Tensor] = lambda rows: rows,
        document_end: int | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: A causal LM.
            settings: Settings of the loop.
            anchor: The anchor term; None without an anchor.
            select_loss_rows: Returns those of the input rows whose hidden states the model returns in this process.
            document_end: Token that ends a document, where attention is masked across documents; else None.

        Raises:
            ConfigError: Attention is to be masked across documents, but the model has an anchor or a module other than
                attention that reads the whole prefix.
        """
        super().__init__()
        self.model, self.settings, self.anchor, self.select_loss_rows = model, settings, anchor, select_loss_rows
        self.precision = choose_precision(settings, model)
        self.auxiliary_modules, self.document_end = find_auxiliary_modules(model), document_end
        reads_prefix = any(getattr(module, "looks_back", False) for module in model.modules())
        if document_end is not None and (anchor or reads_prefix):
            raise ConfigError(
                "train.batch.intra_document_masking=true: neither with an anchor nor where a gate or a judge sees the "
                "whole prefix"
            )

    def around(self, model: nn.Module) -> Objective:
        """Return the same objective of another model, whose layers all processes gather in every micro-batch."""
        anchor = self.anchor and replace(self.anchor, always=True)
        return Objective(model, self.settings, anchor, document_end=self.document_end)

    def forward(self, batch: StepBatch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the loss of a micro-batch, the sum of the modules' auxiliary losses, and the final hidden states.

        Returns:
            The loss, a scalar; the auxiliary losses' sum, a scalar, or None; the hidden states, (B, S, d).
        """
        model, tokens, anchor = self.model, batch.tokens, self.anchor
        if batch.row_kinds is not None:
            set_row_kinds(model, batch.row_kinds)
        with autocast(self.precision, tokens.device):
            options = {}
            if self.document_end is not None:
                options = {"position_ids": compute_positions(tokens[:, :-1], self.document_end)}
            states = compute_hidden_states(model, tokens[:, :-1], **options)
        if batch.weights is not None:
            loss = compute_weighted_loss(
                states, find_head(model), tokens[:, 1:], batch.weights, find_softcap(model), self.precision
            )
        elif anchor is None or batch.anchored is None:
            targets = self.select_loss_rows(tokens[:, 1:])
            loss = compute_next_token_loss(states, find_head(model), targets, find_softcap(model), self.precision)
        else:
            none = not batch.anchored.any()
            rows = tokens[:1] if none and anchor.always else select_rows(tokens, batch.anchored)
            with torch.no_grad(), autocast(self.precision, tokens.device):
                reference = anchor.reference(model, rows[:, :-1]) if len(rows) else None
            loss = compute_anchored_loss(model, states, batch, reference, anchor.weight, self.precision)
        return loss, sum_auxiliary(self.auxiliary_modules), states


def compute_positions(rows: Tensor, end: int) -> Tensor:
    """Return position ids that restart after every token that ends a document, (B, S) to (B, S).

    `transformers` derives attention masks from them that separate the documents of a row.

    >>> compute_positions(torch.tensor([[5, 9, 6, 7, 9, 8]]), end=9).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """
    index = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    begins = torch.cat([torch.zeros_like(rows[:, :1], dtype=torch.bool), rows[:, :-1] == end], dim=1)
    return index - torch.where(begins, index, 0).cummax(dim=1).values


UNKNOWN = -1
"""Kind of a row from a source that the model was not trained on."""


def set_row_kinds(model: nn.Module, row_kinds: Tensor) -> None:
    """Set the kinds of the next forward pass's rows, (B,), or of all rows, (1,), in every module that uses them."""
    for module in model.modules():
        if hasattr(module, "row_kinds"):
            module.row_kinds = row_kinds


def compute_anchored_loss(
    model: nn.Module,
    states: Tensor,
    batch: StepBatch,
    reference: tuple[Tensor, Tensor] | None,
    weight: float,
    precision: str,
) -> Tensor:
    """Return the mean over a micro-batch's tokens: cross-entropy of free rows, weighted divergence of anchored rows.

    Args:
        model: The model that trains.
        states: Its final hidden states, (B, S, d).
        batch: The micro-batch, with `anchored`.
        reference: The backbone's final hidden states on the anchored rows, (anchored rows, S, d), and its head, (V, d).
            Not used where no row is anchored.
        weight: Factor on the divergence.
        precision: Precision of the cross-entropy's matrix products.
    """
    assert batch.anchored is not None
    anchored, count = batch.anchored, len(batch.tokens)
    free, cap = ~anchored, find_softcap(model)
    loss = torch.zeros((), device=states.device)
    if free.any():
        targets = select_rows(batch.tokens, free)[:, 1:]
        entropy = compute_next_token_loss(select_rows(states, free), find_head(model), targets, cap, precision)
        loss = loss + entropy * (free.sum() / count)
    if reference is not None and anchored.any():
        divergence = compute_divergence(select_rows(states, anchored), find_head(model), *reference, cap)
        loss = loss + weight * divergence * (anchored.sum() / count)
    return loss


def select_rows(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the chosen rows of values, (B, ...); `chosen`, (B,), is in CPU memory, so nothing waits for the device."""
    return values[send(chosen.nonzero()[:, 0], values.device)]
