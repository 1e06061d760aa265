"""Routers of mixtures of experts: weights per token in the published conventions, and auxiliary losses.

Shapes: B rows, S tokens per row, N experts, d inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.config.method import Choice, RouterSettings
from mode.gating.select import choose_branches, compute_load_balance, keep_chosen

DENSE = RouterSettings()
"""Default settings: all experts run."""


STD = 0.02
"""Default standard deviation of a router's initial weights."""


class Router(nn.Linear):
    """softmax(W x) over N experts, in fp32, without a bias.

    All experts run by default. With `top_k` or `top_p`, experts that are not chosen have weight zero. The weights of
    the chosen experts are renormalised to sum to one, which equals top-k before the softmax. Without `renormalize`, the
    chosen experts keep their softmax weights.

    Attributes:
        settings: Settings of the map from logits to weights, and of the losses.
        auxiliary: Weighted sum of the losses of the last forward pass in training; None if no loss is set.
        weighs: True: the module's output is weights of experts.
    """

    weighs = True

    def __init__(self, inputs: int, num_experts: int, settings: RouterSettings = DENSE, std: float = STD) -> None:
        """Draw the weights from a normal distribution. Identical experts diverge only if their router weights differ.

        Args:
            inputs: d.
            num_experts: N.
            settings: Settings of the map from logits to weights, and of the losses.
            std: Standard deviation of the initial weights.
        """
        super().__init__(inputs, num_experts, bias=False)
        nn.init.normal_(self.weight, std=std)
        self.settings = settings
        self.auxiliary: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        """Map inputs, (..., d), to weights of experts, (..., N), in fp32."""
        with torch.autocast(states.device.type, enabled=False):
            logits = self.compute_logits(states.float())
            weights = logits.softmax(-1)
            if self.settings.sample:
                return self.sample_expert(logits, weights)
            chosen = choose_branches(weights, self.settings)
            self.auxiliary = self.compute_losses(logits, weights, chosen) if self.training else None
        return keep_chosen(weights, chosen, renormalize=self.settings.renormalize)

    def compute_logits(self, states: Tensor) -> Tensor:
        """Map inputs in fp32, (..., d), to logits of experts, (..., N)."""
        return functional.linear(states, self.weight.float())

    def sample_expert(self, logits: Tensor, weights: Tensor) -> Tensor:
        """Return one-hot weights of one expert per token, with the gradient of a softmax (straight-through).

        In training, Gumbel noise is added to the logits: the expert with the largest noisy logit is chosen, and the
        gradient is that of the softmax of the noisy logits. In evaluation the most likely expert is chosen.

        Args:
            logits: Logits of the experts, (..., N).
            weights: Softmax of the logits, (..., N).
        """
        soft = weights
        if self.training:
            soft = (logits - torch.empty_like(logits).exponential_().log()).softmax(-1)
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        self.auxiliary = self.compute_losses(logits, weights, hard > 0) if self.training else None
        return hard + (soft - soft.detach())

    def compute_losses(self, logits: Tensor, weights: Tensor, chosen: Tensor | None) -> Tensor | None:
        """Return the weighted sum of the load-balance, z and entropy losses that are set; None if no loss is set."""
        parts = []
        if self.settings.balance:
            parts.append(self.settings.balance * compute_load_balance(weights, chosen))
        if self.settings.z:
            parts.append(self.settings.z * logits.logsumexp(-1).square().mean())
        if self.settings.entropy:
            parts.append(self.settings.entropy * torch.special.entr(weights).sum(-1).mean())
        return torch.stack(parts).sum() if parts else None


class LocalizedRouter(Router):
    """A router over experts of two kinds, the first half and the second half, with a localized balance loss (LoRAMoE).

    Each kind of expert is meant for rows of the same kind. All experts run. The loss scales an expert's weight by
    1 + spread in rows of the expert's kind and by 1 - spread in other rows, before it measures the balance.

    Attributes:
        balance: Weight of the loss.
        spread: delta.
        row_kinds: Kind of every row, (B,), 0 or 1. The training loop sets it.
    """

    def __init__(self, inputs: int, num_experts: int, balance: float, spread: float) -> None:
        """Initialise the weights like those of a linear layer.

        Args:
            inputs: d.
            num_experts: N.
            balance: Weight of the loss.
            spread: delta.
        """
        super().__init__(inputs, num_experts)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.balance, self.spread = balance, spread
        self.row_kinds: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        """Map inputs, (B, S, d), to weights of experts, (B, S, N), in fp32."""
        weights = super().forward(states)
        if self.training and self.balance and self.row_kinds is not None:
            self.auxiliary = self.balance * compute_localized_balance(weights, self.row_kinds, self.spread)
        return weights


class AnchoredRouter(Router):
    """softmax(r_0 x, r_1 x + min(b_1, 0), ..., r_N x + min(b_N, 0)): a bias can only prefer expert 0 (FlexOlmo).

    Attributes:
        anchor: r_0, frozen, (1, d).
        weight: r_1 to r_N, (N, d).
        offset: b_1 to b_N, (N,). The initial value is slightly negative, so that it has a gradient.
    """

    def __init__(self, anchor: Tensor, rows: Tensor, settings: RouterSettings = DENSE) -> None:
        """Store the initial rows.

        Args:
            anchor: r_0, (d,) or (1, d).
            rows: r_1 to r_N, (N, d).
            settings: Settings of the map from logits to weights, and of the losses.
        """
        super().__init__(rows.shape[1], len(rows), settings)
        self.anchor = nn.Parameter(anchor.detach().clone().view(1, -1), requires_grad=False)
        self.weight = nn.Parameter(rows.detach().clone())
        self.offset = nn.Parameter(torch.full((len(rows),), -STD))

    def compute_logits(self, states: Tensor) -> Tensor:
        """Map inputs in fp32, (..., d), to logits of experts, (..., N + 1)."""
        rows = torch.cat([self.anchor, self.weight]).float()
        return functional.linear(states, rows) + functional.pad(self.offset.float().clamp(max=0.0), (1, 0))


def compute_localized_balance(weights: Tensor, kinds: Tensor, spread: float) -> Tensor:
    """Return LoRAMoE's localized balance loss: the squared coefficient of variation of the scaled loads Z, (B, N).

    Z = (1 + spread) Q if expert and row are of the same kind, otherwise (1 - spread) Q. Q is the sum of the expert's
    weights over the row. The paper divides the variance by the mean. The paper's code divides it by the square of the
    mean, and so does this function.

    Args:
        weights: Weights of the experts, (B, S, N).
        kinds: Kinds of the rows, (B,), 0 or 1.
        spread: delta.
    """
    count = weights.shape[-1]
    own = torch.arange(count, device=weights.device) * 2 // count
    loads = weights.sum(1) * (1 + spread * (2.0 * (own[None] == kinds[:, None]) - 1))
    return loads.var(correction=0) / loads.mean().square()


class Posterior(nn.Module):
    """Posterior over models given the text so far, softmax_j(log p(text so far | model j)), with a uniform prior.

    Attributes:
        settings: Choice of the models that keep a weight.
        window: Number of last tokens that are the text so far; None for all tokens of the row.
        weighs: True: the module's output is weights of models.
    """

    weighs = True

    def __init__(self, settings: Choice, window: int | None = None) -> None:
        """Store the settings. The module has no parameters."""
        super().__init__()
        self.settings, self.window = settings, window

    def forward(self, evidence: Tensor) -> Tensor:
        """Map log-likelihoods of prefixes, (..., N), to weights of models, (..., N)."""
        weights = evidence.softmax(-1)
        return keep_chosen(weights, choose_branches(weights, self.settings), renormalize=True)

    def sum_evidence(self, likelihoods: Tensor) -> Tensor:
        """Map log-likelihoods of tokens, (B, S, N), to those of the text so far at every token, (B, S, N)."""
        sums = likelihoods.cumsum(1)
        if self.window is None:
            return sums
        return sums - functional.pad(sums, (0, 0, self.window, 0))[:, : sums.shape[1]]
