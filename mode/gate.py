"""The gate: which branch of a block a token hears (paper, equation 1), and the gatings that the paper leaves to others.

Shapes: B rows, S tokens per row, d hidden size, N experts; branch 0 is the backbone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.settings import Choice, GateSettings

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
            chosen = choose(weights, self.settings)
            if self.training and self.settings.balance:
                self.auxiliary = self.settings.balance * load_balance(weights, chosen)
        return keep(weights, chosen, renormalize=self.settings.renormalize)

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


def choose(weights: Tensor, settings: Choice) -> Tensor | None:
    """Return which branches of every token stay, (B, S, N + 1), or None where all do.

    `top_k` keeps the k largest; `top_p` keeps the smallest number of branches, largest first, that hold a share p.

    >>> weights = torch.tensor([0.5, 0.3, 0.2])
    >>> choose(weights, GateSettings(top_k=1)).tolist(), choose(weights, GateSettings(top_p=0.7)).tolist()
    ([True, False, False], [True, True, False])
    """
    if settings.top_k is not None:
        best = weights.topk(min(settings.top_k, weights.shape[-1]), -1).indices
        return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, best, True)
    if settings.top_p is not None:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # a branch stays while those before it do not hold the share yet
        return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, order, before < settings.top_p)
    return None


def keep(weights: Tensor, chosen: Tensor | None, *, renormalize: bool) -> Tensor:
    """Return the weights of the branches that stay, (..., N), which sum to one again with `renormalize`."""
    if chosen is None:
        return weights
    kept = weights * chosen
    return kept / kept.sum(-1, keepdim=True) if renormalize else kept


def load_balance(weights: Tensor, chosen: Tensor | None) -> Tensor:
    """Return the Switch load-balance loss (N + 1) sum_i f_i P_i; 1 where the load is even.

    P_i is branch i's mean weight and f_i its share of all assignments, so that the f_i sum to one however many
    branches a token has. Without a choice every branch is assigned by its weight: f = P.
    """
    share = weights.flatten(0, -2).mean(0)
    load = share if chosen is None else chosen.flatten(0, -2).float().mean(0)
    return weights.shape[-1] * (load / load.sum() * share).sum()
