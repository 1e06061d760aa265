"""Measure the expert weights of gates, routers and posteriors while a model runs: by domain, or token by token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mode.core import processes


def find_gates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose output is weights of experts (`weighs`), by path, in the order of the model."""
    return {name: module for name, module in model.named_modules() if getattr(module, "weighs", False)}


@contextmanager
def watch_gates(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that holds every gate's output in the latest forward pass: one tensor (B, S, branches) per gate."""
    gates = list(find_gates(model).values())
    latest: list[Tensor] = [torch.empty(0) for _ in gates]

    def make_hook(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            latest[number] = output.detach()

        return hook

    hooks = [gate.register_forward_hook(make_hook(number)) for number, gate in enumerate(gates)]
    try:
        yield latest
    finally:
        for hook in hooks:
            hook.remove()


def name_places(names: Sequence[str]) -> list[str]:
    """Return the place of every gate: the part of a block or decoder layer that the gate's path names.

    Several gates can have the same place.

    >>> name_places(["blocks.0.gate", "head.gate", "h.1.mlp.up.router", "h.1.mlp.down.router"])
    ['blocks.0.gate', 'head.gate', 'h.1.mlp', 'h.1.mlp']
    """
    return [match[0] if (match := re.match(r".*?\.\d+\.\w+", name)) else name for name in names]


class GateMeter:
    """Sums the gates' weights over the scored tokens, by domain."""

    def __init__(self, latest: list[Tensor], names: Sequence[str] | None = None) -> None:
        """Measure the list that `watch_gates` yields.

        Args:
            latest: Weights of every gate in the latest forward pass.
            names: Paths of the gates in the model. If given, gates with the same place are averaged.
        """
        self.latest = latest
        self.places = list(range(len(latest))) if names is None else name_places(names)
        self.sums: dict[str, list[dict[str, Tensor]]] = {}
        self.tokens: dict[str, int] = {}

    def add(self, domain: str, count: int) -> None:
        """Add the first `count` tokens of the latest forward pass. The tokens after them are padding.

        Args:
            domain: Domain of the tokens.
            count: Number of tokens to add.
        """
        new = [sum_weights(output.flatten(0, 1)[:count].double()) for output in self.latest]
        before = self.sums.get(domain)
        self.sums[domain] = new if before is None else [add_sums(a, b) for a, b in zip(before, new, strict=True)]
        self.tokens[domain] = self.tokens.get(domain, 0) + count

    def result(self) -> dict[str, dict[str, Any]]:
        """Return the means of every domain, over all processes.

        Returns:
            For each domain, three lists with one entry per place: `mean`, the mean weights of the branches; `entropy`,
            the mean entropy of the weights in nats; `active`, the mean number of branches with a positive weight.
            Branch 0 of a MoDE block is the backbone.
        """
        means = {}
        for domain, sums in self.sums.items():
            totals = [{key: processes.all_reduce_sum(value) for key, value in gate.items()} for gate in sums]
            tokens = int(processes.all_reduce_sum(torch.tensor(self.tokens[domain])))
            means[domain] = self.compute_means(totals, tokens)
        return means

    def compute_means(self, sums: Sequence[Mapping[str, Tensor]], tokens: int) -> dict[str, Any]:
        """Return the means of one domain, over the domain's tokens and the gates of a place."""
        places = dict.fromkeys(self.places)
        groups = [[gate for gate, own in zip(sums, self.places, strict=True) if own == place] for place in places]
        means = {
            key: [sum(gate[key] for gate in group) / (len(group) * tokens) for group in groups]
            for key in ("mean", "entropy", "active")
        }
        return {key: [round_mean(value) for value in values] for key, values in means.items()}


def sum_weights(weights: Tensor) -> dict[str, Tensor]:
    """Sum weights, (tokens, branches), their entropy, and the number of positive weights over tokens."""
    entropy = torch.special.entr(weights).sum()
    return {"mean": weights.sum(0).cpu(), "entropy": entropy.cpu(), "active": (weights > 0).sum().double().cpu()}


def add_sums(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the sums of two batches."""
    return {key: value + other[key] for key, value in one.items()}


def round_mean(value: Any) -> Any:
    """Return a mean as plain numbers, rounded to six decimals.

    >>> round_mean(torch.tensor([0.25, 0.75]))
    [0.25, 0.75]
    """
    return [round(float(x), 6) for x in value] if value.ndim else round(float(value), 6)


@torch.no_grad()
def read_token_gates(model: nn.Module, ids: list[int]) -> Tensor:
    """Return the branch weights behind every prediction of a text, (S - 1, blocks, N + 1). No weights predict token 0.

    Args:
        model: A model with gates.
        ids: Tokens of the text, S of them.
    """
    device = next(model.parameters()).device
    with watch_gates(model) as latest:
        base: Any = model.base_model
        base(input_ids=torch.tensor([ids[:-1]], device=device), use_cache=False)
        return torch.stack([weights[0].cpu() for weights in latest], dim=1)
