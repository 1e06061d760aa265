"""The score of a model on one split of one domain. Evaluation computes it, records hold it, tables read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from mode.records.metrics import ACCURACY, METRICS, Metric

ROUNDING = 0.5001e-3
"""Largest error of a sum of fractions over a document, which is rounded to three decimals."""


@dataclass(frozen=True)
class Score:
    """The score of a model on one split of one domain.

    Attributes:
        values: Recorded metrics, by key.
        stderr: Standard error of the accuracy, clustered by document; None with a single document.
        tokens: Number of scored tokens.
        bytes: Number of UTF-8 bytes of the text; None if the record does not hold it.
        document_tokens: Number of scored tokens in each document.
        document_sums: Sums of a value over each document, by name of the sums.
    """

    values: Mapping[str, float]
    stderr: float | None
    tokens: int
    bytes: int | None
    document_tokens: tuple[int, ...]
    document_sums: Mapping[str, tuple[float, ...]]

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Score:
        """Return a score from the plain data of an upgraded record (`mode.records.contents.upgrade`)."""
        keys, sums = (dict.fromkeys(names) for names in zip(*((m.key, m.sums) for m in METRICS.values()), strict=True))
        return cls(
            values={key: float(plain[key]) for key in keys if key in plain},
            stderr=plain["stderr"],
            tokens=plain["tokens"],
            bytes=plain["bytes"],
            document_tokens=tuple(plain["document_tokens"]),
            document_sums={name: tuple(plain[name]) for name in sums if name in plain},
        )

    def check(self) -> None:
        """Check that the number of tokens, the metrics and the standard error agree with the documents.

        Whole numbers must agree exactly. Sums of fractions over documents are rounded.

        Raises:
            ValueError: A number differs or is not finite.
        """
        documents, hits = np.asarray(self.document_tokens), np.asarray(self.document_sums[ACCURACY.sums])
        if not 0 < self.tokens == documents.sum():
            raise ValueError(f"tokens is {self.tokens}, but the documents have {documents.sum()}")
        if hits.shape != documents.shape or (hits < 0).any() or (hits > documents).any():
            raise ValueError(f"{ACCURACY.sums}: not one number per document, from 0 to document_tokens")
        for metric in METRICS.values():
            value, count = self.values.get(metric.key), self.count(metric.per)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{metric.key} is {value}")
            if value is None or count is None or metric.sums not in self.document_sums:
                continue
            sums = np.asarray(self.document_sums[metric.sums])
            slack = 0.0 if sums.dtype.kind == "i" else ROUNDING * len(sums)
            expected = float(sums.sum() / metric.divisor / count)
            if abs(value - expected) > slack / metric.divisor / count:
                raise ValueError(f"{metric.key} is {value}, but {metric.sums} give {expected}")
        error = compute_error(hits, documents)
        if self.stderr is not None and not (error is not None and math.isclose(error, self.stderr, rel_tol=1e-6)):
            raise ValueError(f"stderr is {self.stderr}, but {ACCURACY.sums} give {error}")

    def to_plain(self) -> dict[str, Any]:
        """Return the score as plain data, for a record."""
        return {
            **self.values,
            "stderr": self.stderr,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "document_tokens": list(self.document_tokens),
            **{name: list(sums) for name, sums in self.document_sums.items()},
        }

    @property
    def accuracy(self) -> float:
        """Share of tokens for which the most likely token is the right one."""
        return self.values[ACCURACY.key]

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, in nats per token."""
        return self.values["loss"]

    def find(self, metric: Metric) -> float | None:
        """Return a metric as recorded, or computed from recorded sums; None if the record holds neither."""
        if metric.key in self.values:
            return self.values[metric.key]
        total, count = self.find_total(metric.sums), self.count(metric.per)
        return None if total is None or count is None else total / metric.divisor / count

    def find_total(self, sums: str) -> float | None:
        """Return the sum of a value over all tokens, from sums over documents or from a metric of this value."""
        if sums in self.document_sums:
            return float(sum(self.document_sums[sums]))
        for other in METRICS.values():
            count = self.count(other.per)
            if other.sums == sums and other.key in self.values and count is not None:
                return self.values[other.key] * count * other.divisor
        return None

    def count(self, per: Literal["token", "byte"]) -> int | None:
        """Return the denominator of a metric: the number of tokens or of bytes."""
        return self.tokens if per == "token" else self.bytes

    def find_error(self, metric: Metric) -> float | None:
        """Return the standard error of a metric, clustered by document; None if the record does not hold the sums."""
        if metric is ACCURACY:
            return self.stderr
        sums, count = self.document_sums.get(metric.sums), self.count(metric.per)
        if sums is None or count is None:
            return None
        error = compute_error(sums, self.document_tokens)
        return None if error is None else error * self.tokens / metric.divisor / count


def compute_error(sums: ArrayLike, tokens: ArrayLike) -> float | None:
    """Return the linearised standard error of a ratio of sums over documents; None with a single document.

    The tokens of a document are not independent, so documents are the sampling units.

    Args:
        sums: Sum of the value over each document.
        tokens: Number of tokens of each document.

    >>> compute_error([1, 3], [4, 4])
    0.25
    """
    values, sizes = np.asarray(sums), np.asarray(tokens)
    count = len(sizes)
    if count < 2:
        return None
    ratio = float(values.sum() / sizes.sum())
    spread = float(((values - ratio * sizes) ** 2).sum())
    return math.sqrt(spread * count / (count - 1)) / float(sizes.sum())
