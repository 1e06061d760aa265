"""Results of pruning, and the table that is rendered from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from mode.core.escape import escape_markdown
from mode.records.collection import Collection
from mode.records.measurement import Measurement, make_id, pick_fields
from mode.records.metrics import ACCURACY

SCHEMA = 1

ORDERS = ("change", "norm", "usage", "random")
"""Orders in which experts are pruned."""


INTRODUCTION = (
    "Next-token top-1 accuracy in per cent after pruning a share of the experts of every layer of a finished run, "
    "without further training. Experts are pruned by an order, the lowest first. Change: growth of the norm of the "
    "expert's row of the router during training. Norm: that norm. Usage: mean weight on validation text of the "
    "targets. Random: random numbers from a seed. The backbone of MoDE is never pruned. Variant: settings of the "
    "method that differ from its configuration."
)


@dataclass(frozen=True)
class Case:
    """Order and share of the pruned experts, and the accuracy by domain without them."""

    order: str
    ratio: float
    accuracy: Mapping[str, float]


@dataclass(frozen=True)
class PruningResult(Measurement):
    """Scores of a run without some of its experts.

    `asked` has the run, the settings of its method that differ from the configuration, orders, ratios and split.
    `happened` has the cases, first the model without pruning. A case has the order, the ratio, the pruned experts and
    their number, and the accuracy and loss by domain.
    """

    def compute_id(self) -> str:
        """Return the id that follows from what was asked. The variant is for display and does not count."""
        return make_id({name: value for name, value in self.asked.items() if name != "variant"})

    @property
    def filename(self) -> str:
        """Name of the result's file."""
        return f"{self.run_name}-{self.id}.json"

    @property
    def run(self) -> str:
        """Id of the run."""
        return str(self.asked["run"])

    @property
    def run_name(self) -> str:
        """Readable name of the run."""
        return str(self.asked["run_name"])

    @property
    def method(self) -> str:
        """Name of the run's method."""
        return str(self.asked["method"])

    @property
    def variant(self) -> str:
        """Settings of the method that differ from its YAML; empty in results of earlier versions."""
        return str(self.asked.get("variant", ""))

    @property
    def cases(self) -> list[Case]:
        """The cases, the model without pruning first."""
        return [pick_fields(Case, case) for case in self.happened["cases"]]


def make_frame(results: Sequence[PruningResult]) -> pd.DataFrame:
    """Return results as a table of texts, with a row for every run, order and ratio."""
    rows = [
        {
            "Method": result.method,
            "Variant": result.variant or "–",
            "Run": f"{result.run_name}-{result.run}",
            "Order": case.order or "–",
            "Pruned": f"{100 * case.ratio:.0f} %",
            **{name.capitalize(): ACCURACY.format(value) for name, value in case.accuracy.items()},
        }
        for result in sorted(results, key=lambda result: result.filename)
        for case in result.cases
    ]
    return pd.DataFrame(rows).fillna("–")


def render_pruned(results: Sequence[PruningResult]) -> dict[str, str]:
    """Render results in Markdown and as CSV."""
    table = make_frame(results)
    markdown = str(
        table.map(escape_markdown).rename(columns=escape_markdown).to_markdown(index=False, disable_numparse=True)
    )
    return {"md": f"# Pruning\n\n{INTRODUCTION}\n\n{markdown}\n", "csv": str(table.to_csv(index=False))}


COLLECTION = Collection("pruning", "pruned run", PruningResult, SCHEMA, "mode prune RUN", render_pruned)
"""The pruning results in a folder of results, and the files that are rendered from them."""
