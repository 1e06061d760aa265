"""Intervals of differences: a paired bootstrap over documents, and paired differences over seeds.

All rows of a table are scored on the same documents. A resample draws as many documents as there are, with replacement.
All rows and seeds have the same resamples. The metric of a resample is computed over all its tokens, so the tokens of a
document stay together.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mode.records.metrics import Metric
from mode.records.score import Score

RESAMPLES = 2000
"""Number of resamples."""


CRITICAL = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Critical values of Student's t, two-sided 95 %, by degrees of freedom from 1."""


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of zero."""
        return self.low > 0.0 or self.high < 0.0


@cache
def draw_resamples(domain: str, documents: int) -> NDArray[np.float64]:
    """Return how often every resample draws each document, (RESAMPLES, documents). The domain's name is the seed."""
    random = np.random.default_rng(zlib.crc32(domain.encode()))
    return random.multinomial(documents, [1.0 / documents] * documents, size=RESAMPLES).astype(np.float64)


def resample(scores: Mapping[str, Score], metric: Metric) -> dict[str, NDArray[np.float64]]:
    """Return a metric in all resamples, (RESAMPLES,), by domain. Domains without sums of the metric are left out.

    The bytes of a document are not recorded. They are assumed to be proportional to its tokens.
    """
    found = {}
    for domain, score in scores.items():
        sums, count = score.document_sums.get(metric.sums), score.count(metric.per)
        if sums is None or count is None:
            continue
        chosen = draw_resamples(domain, len(score.document_tokens))
        tokens = chosen @ np.asarray(score.document_tokens, np.float64)
        # A resample of only empty documents has no metric. It is likely only if most documents are empty.
        per_token = chosen @ np.asarray(sums, np.float64) / np.maximum(tokens, 1.0)
        found[domain] = per_token if metric.per == "token" else per_token * score.tokens / count
        found[domain] = found[domain] / metric.divisor
    return found


def critical_value(freedom: float) -> float:
    """Return the critical value of Student's t, two-sided 95 %. Degrees of freedom are rounded down.

    Beyond the table the value is a close upper bound.

    >>> critical_value(1.0), critical_value(2.9), round(critical_value(60.0), 2)
    (12.706, 4.303, 2.0)
    """
    whole = max(1, int(freedom))
    return CRITICAL[whole - 1] if whole <= len(CRITICAL) else 1.96 + 2.6 / whole


def effective_size(tokens: Sequence[int]) -> float:
    """Return the effective number of documents: that of equally long documents with the same variance.

    It is (sum n)^2 / sum n^2 for documents of n tokens.

    >>> effective_size([5, 5, 5, 5]), effective_size([100, 0, 0])
    (4.0, 1.0)
    """
    sizes = np.asarray(tokens, np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def interval_over_documents(difference: float, resamples: Sequence[NDArray[np.float64]], documents: float) -> Interval:
    """Return the interval over documents of a mean over seeds: Student's t with the bootstrap's standard error.

    Quantiles of the resamples would be too narrow for few documents of different lengths.

    Args:
        difference: Mean difference over seeds.
        resamples: Difference in all resamples, (RESAMPLES,), for each seed.
        documents: Effective number of documents.
    """
    reach = critical_value(documents - 1.0) * float(np.std(np.mean(resamples, axis=0), ddof=1))
    return Interval(difference - reach, difference + reach)


def interval_over_seeds(differences: Sequence[float]) -> Interval | None:
    """Return the t interval of a mean over seeds; None with a single seed.

    >>> interval_over_seeds([1.0, 3.0])
    Interval(low=-10.706, high=14.706)
    >>> interval_over_seeds([1.0])
    """
    count = len(differences)
    if count < 2:
        return None
    mean = sum(differences) / count
    error = math.sqrt(sum((one - mean) ** 2 for one in differences) / (count - 1) / count)
    reach = critical_value(count - 1) * error
    return Interval(mean - reach, mean + reach)
