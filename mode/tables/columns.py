"""Quality columns of a table: a metric of one domain, of the average, of the targets, or as retention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mode.records.metrics import ACCURACY, METRICS, Metric

AVERAGE, TARGET, RETENTION = "average", "target", "retention"
"""Parts other than domains: the mean of all domains, the mean of the targets, the change on all other domains."""


@dataclass(frozen=True)
class Column:
    """A quality column.

    Attributes:
        part: A domain, `average`, `target` or `retention`.
        metric: The metric.
    """

    part: str
    metric: Metric = ACCURACY

    @property
    def name(self) -> str:
        """Name in a table's YAML: PART for the accuracy, PART/METRIC for other metrics."""
        return self.part if self.metric is ACCURACY else f"{self.part}/{self.metric.name}"

    @property
    def heading(self) -> str:
        """Heading of the column.

        >>> Column("code").heading, Column("average", METRICS["loss"]).heading
        ('Code', 'Average, loss')
        """
        heading = self.part.capitalize()
        return heading if self.metric is ACCURACY else f"{heading}, {self.metric.heading.lower()}"

    def is_gain(self, difference: float) -> bool:
        """Return whether a difference is an improvement."""
        return difference > 0.0 if self.metric.higher_is_better else difference < 0.0


def parse_column(name: str) -> Column:
    """Return a column by its name."""
    part, _, metric = name.partition("/")
    return Column(part, METRICS[metric] if metric else ACCURACY)


def list_column_names(domains: Iterable[str]) -> list[str]:
    """Return the names of all columns that a table of these domains can have."""
    parts = [AVERAGE, RETENTION, *domains]
    return [Column(part, metric).name for metric in METRICS.values() for part in parts]
