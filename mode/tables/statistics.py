"""Intervals of differences: a paired bootstrap over documents, and paired differences over seeds.

All rows of a table are scored on the same documents. A resample draws as many documents as there are, with replacement.
All rows and seeds have the same resamples. The metric of a resample is computed over all its tokens, so the tokens of a
document stay together.
"""

from __future__ import annotations

import math
import statistics
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


FEWEST, FEW = 2, 10
"""Effective documents below which there is no interval over documents, and below which a table warns."""


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval by Student's t, and the two-sided p-value of zero."""

    low: float
    high: float
    p: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of zero."""
        return self.low > 0.0 or self.high < 0.0


@dataclass(frozen=True)
class Cell:
    """Mean and sample standard deviation over n seeds. The standard deviation is NaN with one seed."""

    mean: float
    std: float
    n: int

    def text(self, *, signed: bool = False, decimals: int = 2) -> str:
        """Return the cell as text.

        >>> Cell(1.234, 0.1, 3).text(), Cell(1.234, math.nan, 1).text(signed=True)
        ('1.23 ± 0.10', '+1.23')
        """
        mean = f"{self.mean:{'+' if signed else ''}.{decimals}f}"
        return mean if self.n < 2 else f"{mean} ± {self.std:.{decimals}f}"


def summarise_seeds(values: Sequence[float]) -> Cell | None:
    """Return the mean and deviation of the values of several seeds; None without values."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else math.nan
    return Cell(statistics.fmean(values), std, len(values))


@cache
def draw_resamples(domain: str, documents: int) -> NDArray[np.float64]:
    """Return how often every resample draws each document, (RESAMPLES, documents). The domain's name is the seed."""
    random = np.random.default_rng(zlib.crc32(domain.encode()))
    return random.multinomial(documents, [1.0 / documents] * documents, size=RESAMPLES).astype(np.float64)


@cache
def resample_tokens(domain: str, documents: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the tokens of every resample, (RESAMPLES,), given those of each document."""
    return draw_resamples(domain, len(documents)) @ np.asarray(documents, np.float64)


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
        tokens = resample_tokens(domain, tuple(score.document_tokens))
        # A resample of only empty documents has no metric. It is likely only if most documents are empty.
        per_token = chosen @ np.asarray(sums, np.float64) / np.maximum(tokens, 1.0)
        found[domain] = per_token if metric.per == "token" else per_token * score.tokens / count
        found[domain] = found[domain] / metric.divisor
    return found


def make_interval(mean: float, error: float, freedom: float) -> Interval:
    """Return the interval of a mean with a standard error, by Student's t with these degrees of freedom.

    >>> made = make_interval(3.0, 1.0, 4.0)
    >>> round(made.low, 3), round(made.high, 3), round(made.p, 4)
    (0.224, 5.776, 0.0399)
    """
    from scipy.special import stdtr, stdtrit

    reach = float(stdtrit(freedom, 0.975)) * error
    p = 2.0 * float(stdtr(freedom, -abs(mean) / error)) if error else float(mean == 0.0)
    return Interval(mean - reach, mean + reach, p)


def correct_holm(values: Sequence[float]) -> list[float]:
    """Return p-values that are corrected for their number (Holm, 1979), in the order given.

    >>> [round(value, 3) for value in correct_holm([0.04, 0.01, 0.03])]
    [0.06, 0.03, 0.06]
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    corrected, least = list(values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = least
    return corrected


def count_effective(tokens: Sequence[int]) -> float:
    """Return the effective number of documents: that of equally long documents with the same variance.

    It is (sum n)^2 / sum n^2 for documents of n tokens.

    >>> count_effective([5, 5, 5, 5]), count_effective([100, 0, 0])
    (4.0, 1.0)
    """
    sizes = np.asarray(tokens, np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def interval_over_documents(
    difference: float, resamples: Sequence[NDArray[np.float64]], documents: float
) -> Interval | None:
    """Return the interval over documents of a mean over seeds: Student's t with the bootstrap's standard error.

    Quantiles of the resamples would be too narrow for few documents of different lengths. With fewer than two effective
    documents nothing can be said of the spread over documents, and the result is None.

    Args:
        difference: Mean difference over seeds.
        resamples: Difference in all resamples, (RESAMPLES,), for each seed.
        documents: Effective number of documents.
    """
    if documents < FEWEST:
        return None
    return make_interval(difference, float(np.std(np.mean(resamples, axis=0), ddof=1)), documents - 1.0)


def interval_over_seeds(differences: Sequence[float]) -> Interval | None:
    """Return the t interval of a mean over seeds; None with a single seed.

    >>> found = interval_over_seeds([1.0, 3.0])
    >>> round(found.low, 2), round(found.high, 2), round(found.p, 3)
    (-10.71, 14.71, 0.295)
    >>> interval_over_seeds([1.0])
    """
    count = len(differences)
    if count < 2:
        return None
    mean = sum(differences) / count
    error = math.sqrt(sum((one - mean) ** 2 for one in differences) / (count - 1) / count)
    return make_interval(mean, error, count - 1)
