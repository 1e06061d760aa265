"""Clusters of rows of text by the tokens in them, and which of them the text so far is nearest to (c-BTM).

Every token of the vocabulary has a vector: its weight against common tokens, log(rows / rows that have it), times its
loadings on the first components of all rows' weighted counts. A text is the sum of its tokens' vectors, scaled to
length one, so a prefix costs one addition per token and looks at nothing after it.

Shapes: K clusters, V vocabulary size, c components, B rows, S tokens per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.config.method import Choice
from mode.gating.select import choose_branches, keep_chosen

if TYPE_CHECKING:
    from numpy.typing import NDArray

COMPONENTS = 100
"""c, as published."""


ROUNDS = 50
"""Rounds of k-means at most."""


SEED = 20230324
"""Of the decomposition and of the first centres: clusters are the same for every run on the same text."""


class ClusterWeights(nn.Module):
    """Weights of clusters by the distance of the text so far to their centres: softmax(- |z - centre|^2 / T) over K.

    Attributes:
        settings: Which clusters stay.
        temperature: T.
        vectors: Of the tokens, (V, c).
        centres: (K, c).
        weighs: That its output are weights of models.
    """

    weighs = True
    vectors: Tensor
    centres: Tensor

    def __init__(self, vectors: Tensor, centres: Tensor, temperature: float, settings: Choice) -> None:
        """Take clusters as they were found."""
        super().__init__()
        self.settings, self.temperature = settings, temperature
        self.register_buffer("vectors", vectors, persistent=False)
        self.register_buffer("centres", centres, persistent=False)

    def forward(self, sums: Tensor) -> Tensor:
        """Map the sums of prefixes' vectors, (..., c), to weights of clusters, (..., K)."""
        weights = (-compute_squared_distances(sums, self.centres.double()) / self.temperature).softmax(-1)
        return keep_chosen(weights, choose_branches(weights, self.settings), renormalize=True)


def compute_squared_distances(sums: Tensor, centres: Tensor) -> Tensor:
    """Return the squared distances of sums of vectors, (..., c), at length one, to centres, (K, c): (..., K)."""
    places = functional.normalize(sums, dim=-1)
    distances: Tensor = (places[..., None, :] - centres).square().sum(-1)
    return distances


def find_clusters(rows: NDArray[Any], count: int, vocabulary: int) -> tuple[Tensor, Tensor, list[int]]:
    """Cluster rows of tokens into as many clusters of one size.

    Args:
        rows: Tokens, (rows, S).
        count: K.
        vocabulary: V.

    Returns:
        Vectors of the tokens, (V, c); centres, (K, c); and the cluster of every row.
    """
    counts = torch.zeros(len(rows), vocabulary, dtype=torch.float64)
    tokens = torch.from_numpy(np.asarray(rows, np.int64))
    counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.float64))
    rarity = (len(rows) / (counts > 0).sum(0).clamp(min=1)).log()
    weighted = functional.normalize(counts * rarity, dim=1)
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        _, _, loadings = torch.svd_lowrank(weighted, q=min(COMPONENTS, *weighted.shape), niter=4)
        vectors = rarity[:, None] * loadings
        places = functional.normalize(counts @ vectors, dim=1)
        centres = places[torch.randperm(len(places))[:count]]
    members: list[int] = []
    for _ in range(ROUNDS):
        before, members = members, assign_rows(compute_squared_distances(places, centres))
        if members == before:
            break
        of = torch.tensor(members)
        centres = torch.stack([functional.normalize(places[of == number].mean(0), dim=0) for number in range(count)])
    return vectors.float(), centres.float(), members


def assign_rows(distances: Tensor) -> list[int]:
    """Assign rows to clusters of one size: those first that have most to lose by their second choice.

    >>> assign_rows(torch.tensor([[0.0, 0.1], [0.0, 0.9], [0.2, 0.8], [0.3, 0.4]]))
    [1, 0, 0, 1]
    """
    total, count = distances.shape
    room = [total // count + (number < total % count) for number in range(count)]
    ordered = distances.sort(dim=1)
    regret = ordered.values[:, min(1, count - 1)] - ordered.values[:, 0]
    members = [0] * total
    for row in regret.argsort(descending=True, stable=True).tolist():
        wanted = next(number for number in ordered.indices[row].tolist() if room[number])
        room[wanted] -= 1
        members[row] = wanted
    return members


def cut_rows(streams: Sequence[NDArray[Any]], length: int) -> NDArray[Any]:
    """Cut streams of tokens into rows, (rows, length), one stream after the other; what does not fill a row is left."""
    return np.concatenate([one[: len(one) // length * length].reshape(-1, length) for one in streams])
