"""Clusters of rows by their tokens, and weights of the clusters by their distance to the text so far (c-BTM).

Every token of the vocabulary has a vector: its inverse document frequency, log(rows / rows that contain the token),
times its loadings on the first singular vectors of the rows' weighted counts. The vector of a text is the sum of
its tokens' vectors, normalised to length one. So the vector of a prefix costs one addition per token and is causal.

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
"""Number of singular vectors, c, as published."""


ROUNDS = 50
"""Largest number of rounds of k-means."""


SEED = 20230324
"""Seed of the decomposition and of the first centres. All runs on the same text have the same clusters."""


class ClusterWeights(nn.Module):
    """Weights of clusters, softmax over K of - |z - centre|^2 / T, for the vector z of the text so far.

    Attributes:
        settings: Choice of the clusters that keep a weight.
        temperature: T.
        vectors: Vectors of the tokens, (V, c).
        centres: Centres of the clusters, (K, c).
        weighs: True: the module's output is weights of models.
    """

    weighs = True
    vectors: Tensor
    centres: Tensor

    def __init__(self, vectors: Tensor, centres: Tensor, temperature: float, settings: Choice) -> None:
        """Store the result of `find_clusters`, the temperature and the choice.

        Args:
            vectors: Vectors of the tokens, (V, c).
            centres: Centres of the clusters, (K, c).
            temperature: T.
            settings: Choice of the clusters that keep a weight.
        """
        super().__init__()
        self.settings, self.temperature = settings, temperature
        self.register_buffer("vectors", vectors, persistent=False)
        self.register_buffer("centres", centres, persistent=False)

    def forward(self, sums: Tensor) -> Tensor:
        """Map sums of the token vectors of prefixes, (..., c), to weights of clusters, (..., K)."""
        weights = (-compute_squared_distances(sums, self.centres.double()) / self.temperature).softmax(-1)
        return keep_chosen(weights, choose_branches(weights, self.settings), renormalize=True)


def compute_squared_distances(sums: Tensor, centres: Tensor) -> Tensor:
    """Return squared distances, (..., K), of normalised sums of vectors, (..., c), to centres, (K, c)."""
    points = functional.normalize(sums, dim=-1)
    distances: Tensor = (points[..., None, :] - centres).square().sum(-1)
    return distances


def find_clusters(rows: NDArray[Any], count: int, vocabulary: int) -> tuple[Tensor, Tensor, list[int]]:
    """Cluster rows of tokens by balanced k-means, into clusters of equal size.

    Args:
        rows: Tokens, (rows, S).
        count: Number of clusters, K.
        vocabulary: Vocabulary size, V.

    Returns:
        The vectors of the tokens, (V, c); the centres, (K, c); and the cluster of every row.
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
        points = functional.normalize(counts @ vectors, dim=1)
        centres = points[torch.randperm(len(points))[:count]]
    members: list[int] = []
    for _ in range(ROUNDS):
        before, members = members, assign_rows(compute_squared_distances(points, centres))
        if members == before:
            break
        clusters = torch.tensor(members)
        means = [points[clusters == number].mean(0) for number in range(count)]
        centres = torch.stack([functional.normalize(mean, dim=0) for mean in means])
    return vectors.float(), centres.float(), members


def assign_rows(distances: Tensor) -> list[int]:
    """Assign rows to clusters of equal size, greedily. Rows that lose most by their second choice are assigned first.

    Args:
        distances: Distances of the rows to the centres, (rows, K).

    Returns:
        The cluster of every row. Cluster sizes differ by at most one.

    >>> assign_rows(torch.tensor([[0.0, 0.1], [0.0, 0.9], [0.2, 0.8], [0.3, 0.4]]))
    [1, 0, 0, 1]
    """
    total, count = distances.shape
    room = [total // count + (number < total % count) for number in range(count)]
    ordered = distances.sort(dim=1)
    regret = ordered.values[:, min(1, count - 1)] - ordered.values[:, 0]
    members = [0] * total
    for row in regret.argsort(descending=True, stable=True).tolist():
        nearest = next(number for number in ordered.indices[row].tolist() if room[number])
        room[nearest] -= 1
        members[row] = nearest
    return members


def cut_rows(streams: Sequence[NDArray[Any]], length: int) -> NDArray[Any]:
    """Cut token streams into rows, (rows, length), one stream after the other. Incomplete rows are dropped."""
    return np.concatenate([stream[: len(stream) // length * length].reshape(-1, length) for stream in streams])
