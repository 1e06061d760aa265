"""The gate of a block: weights of the branches for every token (paper, equation 1), and variants from other papers.

Shapes: B rows, S tokens per row, d hidden size, N experts. Branch 0 is the backbone.
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
    """Gate that computes the weights of a block's branches: the backbone first, then the experts (equation 1).

    Attributes:
        settings: Settings of the map from logits to weights.
        inner: Hidden layer, or None. With a hidden layer the logits are Linear(gelu(inner(x))).
        slot: Slot of the gate in the key-value cache, for a gate with scope `prefix`.
        padding: Attention mask of the rows so far, (B, S): 1 for text, 0 for padding; None if all tokens are text.
        auxiliary: Load-balance loss of the last forward pass in training; None if the loss is not set.
        looks_back: Whether the gate reads earlier tokens of the row by other means than attention.
        weighs: True: the module's output is weights of experts.
    """

    weighs = True

    def __init__(
        self, hidden_size: int, num_experts: int, backbone_bias: float = 0.0, settings: GateSettings = PLAIN
    ) -> None:
        """Initialise the output layer so that every token has the same weights, softmax(backbone_bias, 0, ..., 0).

        Args:
            hidden_size: d.
            num_experts: N.
            backbone_bias: Initial logit of the backbone.
            settings: Settings of the map from logits to weights.
        """
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
        """Compute branch weights, (B, S, N + 1), in fp32. They sum to one, unless `renormalize=false` drops branches.

        Args:
            states: Input of the block, (B, S, d).
            cache: Key-value cache of the model, which a gate with scope `prefix` reads and updates.
        """
        with torch.autocast(states.device.type, enabled=False):
            x = self.read_states(states, cache)
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

    def read_states(self, states: Tensor, cache: Cache | None) -> Tensor:
        """Return what the gate reads for every token, (B, S, d), in fp32: after the norm and the mean of a prefix."""
        x = states.float()
        if self.settings.norm:
            x = functional.rms_norm(x, (x.shape[-1],), eps=1e-6)
        return self.average_prefix(x, cache) if self.settings.scope == "prefix" else x

    def average_prefix(self, x: Tensor, cache: Cache | None) -> Tensor:
        """Return the causal mean of the states, (B, S, d): for every token, over the token and all tokens before it."""
        new = x.shape[1]
        if cache is not None and self.slot is not None:
            states, _ = cache.update(x[:, None], x[:, None, :, :0], self.slot)
            x = states[:, 0]
        text = torch.ones(x.shape[:2], device=x.device) if self.padding is None else self.padding[:, : x.shape[1]]
        text = text.to(x.dtype)[..., None]
        mean = (x * text).cumsum(1) / text.cumsum(1).clamp(min=1.0)
        return mean[:, -new:]
