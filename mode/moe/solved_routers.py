"""Routers in closed form: ridge regression of the expert that a text belongs to, on the inputs of the router.

Shapes: B rows, S tokens per row, N experts, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.config.method import RouterSettings
from mode.gating.router import Router
from mode.moe.feed_forward import FeedForwardBank
from mode.ops.loss import compute_hidden_states


class ToldRouter(Router):
    """Sends all tokens to one expert, and adds up its inputs.

    Attributes:
        expert: Number of the expert.
        products: X^T X over all inputs, (d, d), in fp64.
        sums: Sum of the inputs that were sent to each expert, X^T Y, (d, N), in fp64.
    """

    def __init__(self, inputs: int, num_experts: int) -> None:
        """Begin without inputs.

        Args:
            inputs: d.
            num_experts: N.
        """
        super().__init__(inputs, num_experts, RouterSettings(top_k=1))
        self.expert = 0
        self.products = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.sums = torch.zeros(inputs, num_experts, dtype=torch.float64)

    def forward(self, states: Tensor) -> Tensor:
        """Map inputs, (B, S, d), to one-hot weights of experts, (B, S, N), in fp32."""
        flat = states.flatten(0, -2).double()
        self.products += flat.T @ flat
        self.sums[:, self.expert] += flat.sum(0)
        weights = torch.zeros(*states.shape[:-1], self.sums.shape[1])
        weights[..., self.expert] = 1.0
        return weights

    def solve(self, ridge: float) -> Tensor:
        """Return the rows of the router, (N, d), each of unit length, in fp32."""
        system = self.products + ridge * torch.eye(len(self.products), dtype=torch.float64)
        return functional.normalize(torch.linalg.solve(system, self.sums).T, dim=1).float()


@torch.no_grad()
def solve_routers(model: nn.Module, banks: Sequence[FeedForwardBank], texts: Sequence[Tensor], ridge: float) -> None:
    """Give every bank of experts a router that tells the experts' texts apart.

    Args:
        model: A causal LM on the CPU, in which all text of an expert goes to that expert in every layer.
        banks: Its banks of N experts. Their routers are changed in place.
        texts: Rows of tokens of each expert, (B, S).
        ridge: Factor on the squared weights.
    """
    told = [ToldRouter(bank.router.in_features, len(bank.experts)) for bank in banks]
    routers = [bank.router for bank in banks]
    for bank, recorder in zip(banks, told, strict=True):
        bank.router = recorder
    for expert, rows in enumerate(texts):
        for recorder in told:
            recorder.expert = expert
        for row in rows:
            compute_hidden_states(model, row[None])
    for bank, router, recorder in zip(banks, routers, told, strict=True):
        router.weight.copy_(recorder.solve(ridge))
        bank.router = router
