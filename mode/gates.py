"""Look at the gates of a modular model while it runs: mean weights and entropy by domain, or weights token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mode.modular import blocks_of


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Hold what every gate gave in the latest forward pass: one tensor (B, S, N + 1) per block, in order."""
    latest: list[Tensor] = [torch.empty(0) for _ in blocks_of(model)]

    def keep(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            latest[number] = output.detach()

        return hook

    hooks = [block.gate.register_forward_hook(keep(number)) for number, block in enumerate(blocks_of(model))]
    try:
        yield latest
    finally:
        for hook in hooks:
            hook.remove()


class GateMeter:
    """Adds up the gates' weights over the tokens that are scored, by domain."""

    def __init__(self, latest: list[Tensor]) -> None:
        """Measure what `watched` holds."""
        self.latest = latest
        self.sums: dict[str, list[Tensor]] = {}
        self.entropies: dict[str, list[Tensor]] = {}
        self.tokens: dict[str, int] = {}

    def add(self, domain: str, count: int) -> None:
        """Add the first `count` tokens of the latest forward pass; those after them are padding."""
        weights = [output.flatten(0, 1)[:count].double() for output in self.latest]
        sums = [value.sum(0).cpu() for value in weights]
        entropies = [torch.special.entr(value).sum().cpu() for value in weights]
        before, entropy = self.sums.get(domain), self.entropies.get(domain)
        self.sums[domain] = sums if before is None else [a + b for a, b in zip(before, sums, strict=True)]
        self.entropies[domain] = (
            entropies if entropy is None else [a + b for a, b in zip(entropy, entropies, strict=True)]
        )
        self.tokens[domain] = self.tokens.get(domain, 0) + count

    def result(self) -> dict[str, dict[str, Any]]:
        """Return, by domain, every block's mean weights (branch 0 is the backbone) and mean entropy in nats."""
        return {
            domain: {
                "mean": [[round(float(x), 6) for x in total / self.tokens[domain]] for total in sums],
                "entropy": [round(float(x) / self.tokens[domain], 6) for x in self.entropies[domain]],
            }
            for domain, sums in self.sums.items()
        }


@torch.no_grad()
def token_gates(model: nn.Module, ids: list[int]) -> Tensor:
    """Return the weights with which every token of a text was predicted, (S - 1, B, N + 1); the first has none."""
    device = next(model.parameters()).device
    with watched(model) as latest:
        base: Any = model.base_model
        base(input_ids=torch.tensor([ids[:-1]], device=device), use_cache=False)
        return torch.stack([weights[0].cpu() for weights in latest], dim=1)
