"""Choose the branches of every token, and measure the balance of their load."""

from __future__ import annotations

import torch
from torch import Tensor

from mode.config.method import Choice


def choose_branches(weights: Tensor, settings: Choice) -> Tensor | None:
    """Return a mask of the branches that every token keeps; None if all branches are kept.

    `top_k` keeps the k largest weights. `top_p` keeps the fewest branches, largest first, whose weights sum to p.

    Args:
        weights: Weights of the branches, (..., branches).
        settings: The choice.

    Returns:
        Boolean mask, (..., branches).

    >>> weights = torch.tensor([0.5, 0.3, 0.2])
    >>> choose_branches(weights, Choice(top_k=1)).tolist(), choose_branches(weights, Choice(top_p=0.7)).tolist()
    ([True, False, False], [True, True, False])
    """
    if settings.top_k is not None:
        best = weights.topk(min(settings.top_k, weights.shape[-1]), -1).indices
        return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, best, True)
    if settings.top_p is not None:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # a branch is kept while the larger ones sum to less than p
        return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, order, before < settings.top_p)
    return None


def keep_chosen(weights: Tensor, chosen: Tensor | None, *, renormalize: bool) -> Tensor:
    """Set the weights of branches that are not chosen to zero.

    Args:
        weights: Weights of the branches, (..., branches).
        chosen: Mask of the chosen branches, of the same shape; None keeps all.
        renormalize: Whether to scale the remaining weights so that they sum to one.
    """
    if chosen is None:
        return weights
    kept = weights * chosen
    return kept / kept.sum(-1, keepdim=True) if renormalize else kept


def compute_load_balance(weights: Tensor, chosen: Tensor | None) -> Tensor:
    """Return the load-balance loss of Switch Transformers, n sum_i f_i P_i over n branches; 1 if the load is even.

    P_i is the mean weight of branch i. f_i is the branch's share of all assignments, so the f_i sum to one for any
    number of branches per token. Without a choice, branches are assigned in proportion to their weights: f = P.

    Args:
        weights: Weights of the branches, (..., branches).
        chosen: Mask of the chosen branches, of the same shape; None if all are kept.
    """
    share = weights.flatten(0, -2).mean(0)
    load = share if chosen is None else chosen.flatten(0, -2).float().mean(0)
    return weights.shape[-1] * (load / load.sum() * share).sum()
