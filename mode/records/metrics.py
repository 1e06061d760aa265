"""Metrics of next-token prediction.

To add a metric, append one `Metric` to `METRICS`. Evaluation then records the metric, and tables, the page and the
command line show it. No other module changes. Earlier records do not hold the metric and show a dash.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mode.core.errors import ConfigError, suggest


@dataclass(frozen=True)
class TokenValues:
    """Values of every scored token, each (num_tokens,).

    Attributes:
        nll: Negative log-likelihood in nats.
        hit: Whether the most likely token is the right one. Of several equally likely tokens the first counts.
        rank: Number of tokens that are more likely than the right one.
    """

    nll: NDArray[np.float64]
    hit: NDArray[np.bool_]
    rank: NDArray[np.int64]


@dataclass(frozen=True)
class Metric:
    """A metric of a split: the sum of a value over its tokens, divided by the number of tokens or of bytes.

    Attributes:
        name: Name on the command line and in a table's YAML.
        heading: Name in headings.
        definition: Definition, as part of a sentence.
        value: Returns the value of every token.
        sums: Name in records of the value's sums over documents. Metrics with the same value share the name.
        unit: Unit of the number shown; empty if the heading contains it.
        per: Denominator: the number of tokens or of bytes.
        divisor: Further divisor of the sum, which changes its unit.
        scale: Factor from the recorded number to the number shown.
        decimals: Decimals of the number shown.
        higher_is_better: Whether a larger number is better.
    """

    name: str
    heading: str
    definition: str
    value: Callable[[TokenValues], NDArray[Any]]
    sums: str
    unit: str = ""
    per: Literal["token", "byte"] = "token"
    divisor: float = 1.0
    scale: float = 1.0
    decimals: int = 3
    higher_is_better: bool = True

    @property
    def key(self) -> str:
        """Name in records."""
        return self.name.replace("-", "_")

    @property
    def label(self) -> str:
        """Heading, with the unit if there is one."""
        return f"{self.heading} ({self.unit})" if self.unit else self.heading

    def format(self, value: float) -> str:
        """Return a recorded number, or its standard error, as text without the unit.

        >>> ACCURACY.format(0.4761)
        '47.61'
        """
        return f"{self.scale * value:.{self.decimals}f}"


ACCURACY = Metric(
    name="accuracy",
    heading="Accuracy",
    definition="next-token top-1 accuracy in per cent",
    value=lambda tokens: tokens.hit,
    sums="document_hits",
    unit="%",
    scale=100.0,
    decimals=2,
)


METRICS = {
    metric.name: metric
    for metric in (
        ACCURACY,
        Metric(
            name="top-5-accuracy",
            heading="Top-5 accuracy",
            definition="next-token top-5 accuracy in per cent (fewer than five tokens are likelier than the right one)",
            value=lambda tokens: tokens.rank < 5,
            sums="document_top_5_hits",
            unit="%",
            scale=100.0,
            decimals=2,
        ),
        Metric(
            name="loss",
            heading="Loss",
            definition="negative log-likelihood in nats per token (lower is better)",
            value=lambda tokens: tokens.nll,
            sums="document_nll",
            unit="nats per token",
            higher_is_better=False,
        ),
        Metric(
            name="bits-per-byte",
            heading="Bits per byte",
            definition="negative log-likelihood in bits per UTF-8 byte of the text (lower is better)",
            value=lambda tokens: tokens.nll,
            sums="document_nll",
            per="byte",
            divisor=math.log(2),
            higher_is_better=False,
        ),
    )
}
"""All metrics by name, in order of display. A table shows the accuracy unless it names other metrics."""


def find_metrics(names: Iterable[str]) -> tuple[Metric, ...]:
    """Return metrics by their names.

    Raises:
        ConfigError: A name is not the name of a metric.
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"metric {name}: not one of {', '.join(METRICS)}{suggest(name, METRICS)}")
    return tuple(METRICS[name] for name in names)
