"""What is noise: a paired bootstrap over documents, and paired differences over seeds.

Rows of a table are scored on the same documents. A resample draws as many documents as there are, with replacement,
the same ones for every row and seed; a domain's accuracy is that of their tokens together, so that tokens of a document
stay together.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CRITICAL = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for two-sided 95 % by degrees of freedom, from 1; with more than nine the last is a little wide."""


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it is on one side of zero."""
        return self.low > 0.0 or self.high < 0.0


@cache
def draws(domain: str, documents: int) -> NDArray[np.float64]:
    """Return how often each document is drawn, (RESAMPLES, documents); the same for all that is scored on them."""
    random = np.random.default_rng(zlib.crc32(domain.encode()))
    return random.multinomial(documents, [1.0 / documents] * documents, size=RESAMPLES).astype(np.float64)


def resampled(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """Return a record's accuracy in every resample, (RESAMPLES,), by domain."""
    found = {}
    for domain, score in scores.items():
        chosen = draws(domain, len(score["document_tokens"]))
        tokens = chosen @ np.asarray(score["document_tokens"], np.float64)
        # A resample of empty documents alone has no accuracy; it can only be drawn where most documents are empty.
        found[domain] = chosen @ np.asarray(score["document_hits"], np.float64) / np.maximum(tokens, 1.0)
    return found


def over_documents(differences: Sequence[NDArray[np.float64]]) -> Interval:
    """Return the bootstrap's interval of a mean over seeds.

    Args:
        differences: By seed: the difference in every resample, (RESAMPLES,).
    """
    low, high = np.quantile(np.mean(differences, axis=0), [0.025, 0.975])
    return Interval(float(low), float(high))


def over_seeds(differences: Sequence[float]) -> Interval | None:
    """Return the t interval of a mean over seeds; None with a single one.

    >>> over_seeds([1.0, 3.0])
    Interval(low=-10.706, high=14.706)
    >>> over_seeds([1.0])
    """
    count = len(differences)
    if count < 2:
        return None
    mean = sum(differences) / count
    error = math.sqrt(sum((one - mean) ** 2 for one in differences) / (count - 1) / count)
    reach = CRITICAL[min(count - 1, len(CRITICAL)) - 1] * error
    return Interval(mean - reach, mean + reach)
