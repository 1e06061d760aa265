"""The router of a mixture of experts: weights per token, by any of the published conventions, and its losses.

Shapes: N experts, d inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.config.method import Choice, RouterSettings
from mode.gating.select import choose_branches, compute_load_balance, keep_chosen

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
        weighs: That its output are weights of experts.
    """

    weighs = True

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
            if self.settings.sample:
                return self.one(logits, weights)
            chosen = choose_branches(weights, self.settings)
            self.auxiliary = self.losses(logits, weights, chosen) if self.training else None
        return keep_chosen(weights, chosen, renormalize=self.settings.renormalize)

    def one(self, logits: Tensor, weights: Tensor) -> Tensor:
        """Return 1 for one expert of every token and 0 for the others, with the gradient of its probability.

        In training the expert is drawn: the largest logit after Gumbel noise, and the gradient is of its softmax.
        """
        soft = weights
        if self.training:
            soft = (logits - torch.empty_like(logits).exponential_().log()).softmax(-1)
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        self.auxiliary = self.losses(logits, weights, hard > 0) if self.training else None
        return hard + (soft - soft.detach())

    def losses(self, logits: Tensor, weights: Tensor, chosen: Tensor | None) -> Tensor | None:
        """Return the weighted sum of the losses that are asked for, or None."""
        parts = []
        if self.settings.balance:
            parts.append(self.settings.balance * compute_load_balance(weights, chosen))
        if self.settings.z:
            parts.append(self.settings.z * logits.logsumexp(-1).square().mean())
        if self.settings.entropy:
            parts.append(self.settings.entropy * torch.special.entr(weights).sum(-1).mean())
        return torch.stack(parts).sum() if parts else None


class LocalizedRouter(Router):
    """A router over experts of two kinds, the first half and the second, each for rows of its kind (LoRAMoE).

    All experts run. The loss is even where experts of a row's kind together get more of it than the others, by as much
    as (1 + spread) / (1 - spread).

    Attributes:
        balance: Weight of the loss.
        spread: delta.
        row_kinds: Kind of every row, (B,), 0 or 1, as the loop tells it in training.
    """

    def __init__(self, inputs: int, num_experts: int, balance: float, spread: float) -> None:
        """Start at random, as a linear layer does."""
        super().__init__(inputs, num_experts)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.balance, self.spread = balance, spread
        self.row_kinds: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        """Map what a router reads, (B, S, d), to weights of experts, (B, S, N), in fp32."""
        weights = super().forward(states)
        if self.training and self.balance and self.row_kinds is not None:
            self.auxiliary = self.balance * compute_localized_balance(weights, self.row_kinds, self.spread)
        return weights


def compute_localized_balance(weights: Tensor, kinds: Tensor, spread: float) -> Tensor:
    """Return the squared coefficient of variation of Z, an expert's weight in a row, scaled by whether kinds agree.

    Z = (1 + spread) Q where expert and row are of one kind, else (1 - spread) Q, with Q the sum of the expert's weights
    over the row. The paper divides the variance by the mean, its code by the mean's square, as here.

    Args:
        weights: (B, S, N).
        kinds: Of the rows, (B,), 0 or 1.
        spread: delta.
    """
    count = weights.shape[-1]
    own = torch.arange(count, device=weights.device) * 2 // count
    loads = weights.sum(1) * (1 + spread * (2.0 * (own[None] == kinds[:, None]) - 1))
    return loads.var(correction=0) / loads.mean().square()


class Posterior(nn.Module):
    """Which of several models a text is by: softmax(log p(text so far | model j)) over models, all as likely at first.

    Attributes:
        settings: Which models stay.
        weighs: That its output are weights of models.
    """

    weighs = True

    def __init__(self, settings: Choice) -> None:
        """Nothing is learned."""
        super().__init__()
        self.settings = settings

    def forward(self, evidence: Tensor) -> Tensor:
        """Map the log-likelihoods of prefixes, (..., N), to weights of models, (..., N)."""
        weights = evidence.softmax(-1)
        return keep_chosen(weights, choose_branches(weights, self.settings), renormalize=True)
