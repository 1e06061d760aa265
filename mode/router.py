"""The router of a mixture of experts: weights per token, by any of the published conventions, and its losses.

Shapes: N experts, d inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.gate import choose, load_balance
from mode.settings import Choice, RouterSettings

DENSE = RouterSettings()
STD = 0.02
"""Standard deviation of a router's first weights, unless a method says otherwise."""


class Router(nn.Linear):
    """softmax(W x) over N experts, in fp32, without a bias.

    All experts run by default. With `top_k` or `top_p` the others' weights are zero, and those that stay sum to one
    (top-k before the softmax, or after it and renormalised: the two are the same) or, without `renormalize`, keep
    what the softmax gave them.

    Attributes:
        settings: How logits become weights, and the losses.
        auxiliary: Sum of the losses of the last forward pass in training, if any is asked for.
    """

    def __init__(self, inputs: int, num_experts: int, settings: RouterSettings = DENSE, std: float = STD) -> None:
        """Start at random: experts that begin alike grow apart only where their weights differ."""
        super().__init__(inputs, num_experts, bias=False)
        nn.init.normal_(self.weight, std=std)
        self.settings = settings
        self.auxiliary: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        """Map what a router reads, (..., d), to weights of experts, (..., N), in fp32."""
        with torch.autocast(states.device.type, enabled=False):
            logits = functional.linear(states.float(), self.weight.float())
            weights = logits.softmax(-1)
            chosen = choose(weights, self.settings)
            self.auxiliary = self.losses(logits, weights, chosen) if self.training else None
        if chosen is None:
            return weights
        kept = weights * chosen
        return kept / kept.sum(-1, keepdim=True) if self.settings.renormalize else kept

    def losses(self, logits: Tensor, weights: Tensor, chosen: Tensor | None) -> Tensor | None:
        """Return the weighted sum of the losses that are asked for, or None."""
        parts = []
        if self.settings.balance:
            parts.append(self.settings.balance * load_balance(weights, chosen))
        if self.settings.z:
            parts.append(self.settings.z * logits.logsumexp(-1).square().mean())
        if self.settings.entropy:
            parts.append(self.settings.entropy * torch.special.entr(weights).sum(-1).mean())
        return torch.stack(parts).sum() if parts else None


class Posterior(nn.Module):
    """Which of several models a text is by: softmax(log p(text so far | model j)) over models, all as likely at first.

    Attributes:
        settings: Which models stay.
    """

    def __init__(self, settings: Choice) -> None:
        """Nothing is learned."""
        super().__init__()
        self.settings = settings

    def forward(self, evidence: Tensor) -> Tensor:
        """Map the log-likelihoods of prefixes, (..., N), to weights of models, (..., N)."""
        weights = evidence.softmax(-1)
        chosen = choose(weights, self.settings)
        return weights if chosen is None else weights * chosen / (weights * chosen).sum(-1, keepdim=True)
