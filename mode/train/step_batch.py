"""The rows of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mode.core.device import send


@dataclass(frozen=True)
class StepBatch:
    """Rows of tokens, and what the objective needs to know of every row.

    Attributes:
        tokens: Token ids, (B, S + 1).
        anchored: Whether a row trains the divergence from the backbone instead of the cross-entropy, (B,), boolean.
            Always in CPU memory, since it decides which computations run. None without an anchor.
        row_kinds: Kind of every row, (B,), for models that condition on it. None for the others.
        weights: Weight of every token's cross-entropy, (B, S). None where all tokens count alike.
    """

    tokens: Tensor
    anchored: Tensor | None = None
    row_kinds: Tensor | None = None
    weights: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> StepBatch:
        """Return a batch with a function applied to every tensor."""
        others = (self.anchored, self.row_kinds, self.weights)
        return StepBatch(function(self.tokens), *(None if each is None else function(each) for each in others))

    def to(self, device: torch.device) -> StepBatch:
        """Return the batch on a device, without waiting for the copy; `anchored` stays in CPU memory."""
        row_kinds, weights = (None if each is None else send(each, device) for each in (self.row_kinds, self.weights))
        return StepBatch(send(self.tokens, device), self.anchored, row_kinds, weights)

    def split(self, count: int) -> list[StepBatch]:
        """Return the micro-batches of a step, in order.

        >>> [micro_batch.tokens.tolist() for micro_batch in StepBatch(torch.tensor([[1, 2], [3, 4]])).split(2)]
        [[[1, 2]], [[3, 4]]]
        """
        tokens = self.tokens.chunk(count)
        missing = [None] * len(tokens)
        others = (self.anchored, self.row_kinds, self.weights)
        parts = (missing if each is None else each.chunk(count) for each in others)
        return [StepBatch(*part) for part in zip(tokens, *parts, strict=True)]
