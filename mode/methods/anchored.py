"""Methods that can train with an anchor: the divergence from the backbone on some rows of the mix."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING

from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT, as_fraction
from mode.config.method import Anchor
from mode.config.run import Run
from mode.cost.flops import compute_untouched_cost
from mode.methods.base import Method, Reference

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@settings(frozen=True, kw_only=True, config=STRICT)
class Adaptation(Method):
    """A method that adapts a backbone, with an optional anchor.

    Attributes:
        anchor: Source, share and weight of the anchored rows; none by default, as published.
    """

    anchor: Anchor = Anchor()

    def reads(self) -> tuple[str, ...]:
        """Return the domain of the anchored rows, if a domain is their source."""
        return () if self.anchor.domain is None else (self.anchor.domain,)

    def mixture(self, run: Run) -> dict[str, int]:
        """Return the rows of every source in a cycle of the training mix, those of the anchor last."""
        rows = super().mixture(run)
        if self.anchor.source == "none":
            return rows
        free, anchored = sum(rows.values()), as_fraction(self.anchor.share)
        shares = {name: Fraction(count, free) * (1 - anchored) for name, count in rows.items()}
        shares[self.anchor.source] = anchored
        common = math.lcm(*(share.denominator for share in shares.values()))
        return {name: int(share * common) for name, share in shares.items()}

    def anchoring_flops(self, run: Run) -> float:
        """Return the operations of the backbone's predictions on anchored rows, per token of the mix."""
        if self.anchor.source == "none":
            return 0.0
        shape = read_shape(run.backbone)
        return self.anchor.share * compute_untouched_cost(shape, run.train.sequence_length).flops.forward

    def reference(self, backbone: Callable[[], PreTrainedModel], device: torch.device) -> Reference:
        """Return a function from the model that trains and rows of tokens to the backbone's hidden states and head.

        By default a frozen copy of the backbone computes them.

        Args:
            backbone: Loads a fresh copy of the backbone.
            device: Device of the model that trains.
        """
        from mode.ops.loss import compute_hidden_states, find_head

        frozen = backbone().requires_grad_(False).eval().to(device)
        return lambda _, rows: (compute_hidden_states(frozen, rows), find_head(frozen))
