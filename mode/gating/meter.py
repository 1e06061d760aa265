"""Look at what weighs experts while a model runs, gates, routers or a posterior: by domain, or token by token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mode.core import processes


def find_gates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose output are weights of experts (`weighs`), by their paths, in order."""
    return {name: module for name, module in model.named_modules() if getattr(module, "weighs", False)}


@contextmanager
def watch_gates(model: nn.Module) -> Iterator[list[Tensor]]:
    """Hold what every gate gave in the latest forward pass: one tensor (B, S, branches) per gate, in order."""
    gates = list(find_gates(model).values())
    latest: list[Tensor] = [torch.empty(0) for _ in gates]

    def keep(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            latest[number] = output.detach()

        return hook

    hooks = [gate.register_forward_hook(keep(number)) for number, gate in enumerate(gates)]
    try:
        yield latest
    finally:
        for hook in hooks:
            hook.remove()


def name_places(names: Sequence[str]) -> list[str]:
    """Return the part of a block or decoder layer of every gate, by its path: a part may have several.

    >>> name_places(["blocks.0.gate", "head.gate", "h.1.mlp.up.router", "h.1.mlp.down.router"])
    ['blocks.0.gate', 'head.gate', 'h.1.mlp', 'h.1.mlp']
    """
    return [match[0] if (match := re.match(r".*?\.\d+\.\w+", name)) else name for name in names]


class GateMeter:
    """Adds up the gates' weights over the tokens that are scored, by domain."""

    def __init__(self, latest: list[Tensor], names: Sequence[str] | None = None) -> None:
        """Measure what `watch_gates` holds.

        Args:
            latest: The gates' latest weights.
            names: Their paths in the model, if those of one layer are to be told as one.
        """
        self.latest = latest
        self.places = list(range(len(latest))) if names is None else name_places(names)
        self.sums: dict[str, list[dict[str, Tensor]]] = {}
        self.tokens: dict[str, int] = {}

    def add(self, domain: str, count: int) -> None:
        """Add the first `count` tokens of the latest forward pass; those after them are padding."""
        found = [sum_weights(output.flatten(0, 1)[:count].double()) for output in self.latest]
        before = self.sums.get(domain)
        self.sums[domain] = found if before is None else [add_sums(a, b) for a, b in zip(before, found, strict=True)]
        self.tokens[domain] = self.tokens.get(domain, 0) + count

    def result(self) -> dict[str, dict[str, Any]]:
        """Return, by domain, of every place the mean weights, their mean entropy in nats, and the mean number in use.

        Of a MoDE block, branch 0 is the backbone.
        """
        found = {}
        for domain, sums in self.sums.items():
            everyone = [{key: processes.all_reduce_sum(value) for key, value in one.items()} for one in sums]
            found[domain] = self.told(everyone, int(processes.all_reduce_sum(torch.tensor(self.tokens[domain]))))
        return found

    def told(self, sums: Sequence[Mapping[str, Tensor]], tokens: int) -> dict[str, Any]:
        """Return the means of one domain, over its tokens and the gates of a place."""
        places_once = dict.fromkeys(self.places)
        groups = [[one for one, here in zip(sums, self.places, strict=True) if here == place] for place in places_once]
        means = {
            key: [sum(one[key] for one in group) / (len(group) * tokens) for group in groups]
            for key in ("mean", "entropy", "active")
        }
        return {key: [average(value) for value in values] for key, values in means.items()}


def sum_weights(weights: Tensor) -> dict[str, Tensor]:
    """Sum over tokens, (tokens, branches), what is told of weights."""
    entropy = torch.special.entr(weights).sum()
    return {"mean": weights.sum(0).cpu(), "entropy": entropy.cpu(), "active": (weights > 0).sum().double().cpu()}


def add_sums(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add what was summed over two batches."""
    return {key: value + other[key] for key, value in one.items()}


def average(value: Any) -> Any:
    """Return a mean as plain numbers.

    >>> average(torch.tensor([0.25, 0.75]))
    [0.25, 0.75]
    """
    return [round(float(x), 6) for x in value] if value.ndim else round(float(value), 6)


@torch.no_grad()
def read_token_gates(model: nn.Module, ids: list[int]) -> Tensor:
    """Return the weights with which every token of a text was predicted, (S - 1, B, N + 1); the first has none."""
    device = next(model.parameters()).device
    with watch_gates(model) as latest:
        base: Any = model.base_model
        base(input_ids=torch.tensor([ids[:-1]], device=device), use_cache=False)
        return torch.stack([weights[0].cpu() for weights in latest], dim=1)
