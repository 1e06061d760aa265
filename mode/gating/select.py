"""Which branches a token keeps, and how even their load is."""

from __future__ import annotations

import torch
from torch import Tensor

from mode.config.method import Choice


def choose_branches(weights: Tensor, settings: Choice) -> Tensor | None:
    """Return which branches of every token stay, (B, S, N + 1), or None where all do.

    `top_k` keeps the k largest; `top_p` keeps the smallest number of branches, largest first, that hold a share p.

    >>> weights = torch.tensor([0.5, 0.3, 0.2])
    >>> choose_branches(weights, Choice(top_k=1)).tolist(), choose_branches(weights, Choice(top_p=0.7)).tolist()
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


def keep_chosen(weights: Tensor, chosen: Tensor | None, *, renormalize: bool) -> Tensor:
    """Return the weights of the branches that stay, (..., N), which sum to one again with `renormalize`."""
    if chosen is None:
        return weights
    kept = weights * chosen
    return kept / kept.sum(-1, keepdim=True) if renormalize else kept


def compute_load_balance(weights: Tensor, chosen: Tensor | None) -> Tensor:
    """Return the Switch load-balance loss (N + 1) sum_i f_i P_i; 1 where the load is even.

    P_i is branch i's mean weight and f_i its share of all assignments, so that the f_i sum to one however many
    branches a token has. Without a choice every branch is assigned by its weight: f = P.
    """
    share = weights.flatten(0, -2).mean(0)
    load = share if chosen is None else chosen.flatten(0, -2).float().mean(0)
    return weights.shape[-1] * (load / load.sum() * share).sum()
