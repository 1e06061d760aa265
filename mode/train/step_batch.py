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
    """

    tokens: Tensor
    anchored: Tensor | None = None
    row_kinds: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> StepBatch:
        """Return a batch with a function applied to every tensor."""
        anchored, row_kinds = (None if each is None else function(each) for each in (self.anchored, self.row_kinds))
        return StepBatch(function(self.tokens), anchored, row_kinds)

    def to(self, device: torch.device) -> StepBatch:
        """Return the batch on a device, without waiting for the copy; `anchored` stays in CPU memory."""
        row_kinds = None if self.row_kinds is None else send(self.row_kinds, device)
        return StepBatch(send(self.tokens, device), self.anchored, row_kinds)

    def split(self, count: int) -> list[StepBatch]:
        """Return the micro-batches of a step, in order.

        >>> [micro_batch.tokens.tolist() for micro_batch in StepBatch(torch.tensor([[1, 2], [3, 4]])).split(2)]
        [[[1, 2]], [[3, 4]]]
        """
        tokens = self.tokens.chunk(count)
        missing = [None] * len(tokens)
        anchored = missing if self.anchored is None else self.anchored.chunk(count)
        row_kinds = missing if self.row_kinds is None else self.row_kinds.chunk(count)
        return [StepBatch(*parts) for parts in zip(tokens, anchored, row_kinds, strict=True)]
