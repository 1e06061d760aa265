"""Algebra on the weights of models that have the same names and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def mean(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the arithmetic mean of models' weights, by name, summed in fp64.

    >>> import torch
    >>> mean([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 2.0])}])
    {'w': tensor([2., 2.])}
    """
    first, *_ = states
    return {
        name: (sum(state[name].double() for state in states) / len(states)).to(value.dtype)  # type: ignore[union-attr]
        for name, value in first.items()
    }
