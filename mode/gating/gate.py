"""The gate: which branch of a block a token hears (paper, equation 1), and the gatings that the paper leaves to others.

Shapes: B rows, S tokens per row, d hidden size, N experts; branch 0 is the backbone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.config.method import GateSettings
from mode.gating.select import choose_branches, compute_load_balance, keep_chosen

if TYPE_CHECKING:
    from transformers import Cache

PLAIN = GateSettings()


class Gate(nn.Linear):
    """Weights of a block's branches: the backbone first, then the experts (equation 1).

    Attributes:
        settings: How logits become weights.
        inner: Its hidden layer, if it has one; then the logits are Linear(gelu(inner(x))).
        slot: Slot of a gate that sees the whole prefix in the key-value cache.
        padding: Which tokens of the rows so far are text, (B, S), where a caller knows of padding.
        auxiliary: Load-balance loss of the last forward pass in training, if one is asked for.
        looks_back: Whether it sees more of a row than what it weighs.
        weighs: That its output are weights of experts.
    """

    weighs = True

    def __init__(
        self, hidden_size: int, num_experts: int, backbone_bias: float = 0.0, settings: GateSettings = PLAIN
    ) -> None:
        """Start with the same weights for every token: the softmax of `backbone_bias` and, for each expert, 0."""
        super().__init__(settings.hidden or hidden_size, num_experts + 1)
        with torch.no_grad():
            self.weight.zero_()
            self.bias.zero_()
            self.bias[0] = backbone_bias
        self.settings = settings
        self.inner = nn.Linear(hidden_size, settings.hidden) if settings.hidden else None
        self.slot: int | None = None
        self.padding: Tensor | None = None
        self.auxiliary: Tensor | None = None
        self.looks_back = settings.scope == "prefix"

    def forward(self, states: Tensor, cache: Cache | None = None) -> Tensor:
        """Map a block's input, (B, S, d), to branch weights, (B, S, N + 1), in fp32.

        They sum to one, unless `renormalize=false` drops branches without making up for them.
        """
        with torch.autocast(states.device.type, enabled=False):
            x = states.float()
            if self.settings.norm:
                x = functional.rms_norm(x, (x.shape[-1],), eps=1e-6)
            if self.settings.scope == "prefix":
                x = self.prefix_mean(x, cache)
            if self.inner is not None:
                x = functional.gelu(functional.linear(x, self.inner.weight.float(), self.inner.bias.float()))
            logits = functional.linear(x, self.weight.float(), self.bias.float())
            if self.settings.temperature != 1.0:
                logits = logits / self.settings.temperature
            weights = logits.softmax(-1)
            chosen = choose_branches(weights, self.settings)
            if self.training and self.settings.balance:
                self.auxiliary = self.settings.balance * compute_load_balance(weights, chosen)
        return keep_chosen(weights, chosen, renormalize=self.settings.renormalize)

    def prefix_mean(self, x: Tensor, cache: Cache | None) -> Tensor:
        """Return the mean of every token's prefix, itself included, (B, S, d): sequence-level, yet causal."""
        new = x.shape[1]
        if cache is not None and self.slot is not None:
            seen, _ = cache.update(x[:, None], x[:, None, :, :0], self.slot)
            x = seen[:, 0]
        text = torch.ones(x.shape[:2], device=x.device) if self.padding is None else self.padding[:, : x.shape[1]]
        text = text.to(x.dtype)[..., None]
        mean = (x * text).cumsum(1) / text.cumsum(1).clamp(min=1.0)
        return mean[:, -new:]
