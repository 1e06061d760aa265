"""Gates in closed form: the posterior of the branch that a text belongs to, given a gate's input.

The inputs x of a gate on text of branch k are taken as normal with mean m_k and a covariance C that all branches share
(linear discriminant analysis). With equal priors the posterior is the gate itself, softmax(W x + b), with

    w_k = C^-1 m_k,    b_k = -(1/2) m_k^T C^-1 m_k.

C is shrunk towards a multiple of the identity. While inputs are collected, text of a branch goes to that branch in all
blocks. As in DUME the means and products are sums over texts, so that a branch joins by adding its own.

Shapes: B rows, S tokens per row, N experts, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mode.gating.gate import Gate

if TYPE_CHECKING:
    from transformers import Cache

ROWS = 64
"""Maximum number of rows of text of a branch."""


SHRINKAGE = 0.1
"""Weight of the multiple of the identity in the covariance."""


class ToldGate(Gate):
    """Sends all tokens to one branch, and adds up what the gate reads.

    Attributes:
        branch: Number of the branch.
        counts: Tokens of every branch, (N + 1,).
        sums: Sum of the inputs of every branch, (N + 1, d), in fp64.
        products: Sum of x x^T over all inputs, (d, d), in fp64.
    """

    def __init__(self, gate: Gate) -> None:
        """Begin without inputs, with the settings of a gate."""
        super().__init__(gate.in_features, gate.out_features - 1, settings=gate.settings)
        self.slot, self.branch = gate.slot, 0
        self.counts = torch.zeros(gate.out_features, dtype=torch.float64)
        self.sums = torch.zeros(gate.out_features, gate.in_features, dtype=torch.float64)
        self.products = torch.zeros(gate.in_features, gate.in_features, dtype=torch.float64)

    def forward(self, states: Tensor, cache: Cache | None = None) -> Tensor:
        """Return one-hot weights of the branch, (B, S, N + 1)."""
        flat = self.read_states(states, cache).flatten(0, -2).double()
        self.counts[self.branch] += len(flat)
        self.sums[self.branch] += flat.sum(0)
        self.products += flat.T @ flat
        weights = torch.zeros(*states.shape[:-1], len(self.counts))
        weights[..., self.branch] = 1.0
        return weights

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return W, (N + 1, d), and b, (N + 1,), in fp64."""
        means = self.sums / self.counts[:, None]
        covariance = (self.products - (self.counts[:, None] * means).T @ means) / self.counts.sum()
        size = len(covariance)
        spread = covariance.trace() / size * torch.eye(size, dtype=torch.float64)
        weight = torch.linalg.solve(torch.lerp(covariance, spread, SHRINKAGE), means.T).T
        return weight, -0.5 * (weight * means).sum(1)


@torch.no_grad()
def solve_gates(model: nn.Module, texts: Sequence[Tensor]) -> None:
    """Set the gates of a modular model, in place.

    Args:
        model: A modular model with N experts, on the CPU. Its gates have no hidden layer.
        texts: Rows of tokens of every branch, the backbone's first, (B, S) each.
    """
    owners: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "gate", None), Gate)]
    gates: list[Gate] = [owner.gate for owner in owners]
    told = [ToldGate(gate) for gate in gates]
    for owner, recorder in zip(owners, told, strict=True):
        owner.gate = recorder
    training = model.training
    model.eval()
    for branch, rows in enumerate(texts):
        for recorder in told:
            recorder.branch = branch
        for row in rows:
            model(input_ids=row[None], use_cache=False)
    model.train(training)
    for owner, gate, recorder in zip(owners, gates, told, strict=True):
        weight, bias = recorder.solve()
        gate.weight.copy_(gate.settings.temperature * weight)
        gate.bias.copy_(gate.settings.temperature * bias)
        owner.gate = gate
