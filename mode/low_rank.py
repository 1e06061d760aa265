"""What methods have in common whose size is the rank of what they add to a backbone's matrices."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.checked import STRICT, ConfigError
from mode.config import replace
from mode.cost import beside, shape_of
from mode.method import Adaptation
from mode.settings import Budget, Run


@settings(frozen=True, kw_only=True, config=STRICT)
class LowRank(Adaptation):
    """A method that adds products of two thin matrices.

    Attributes:
        rank: r.
        alpha: Numerator of the scale alpha / r.
    """

    rank: Annotated[int, Field(gt=0)]
    alpha: Annotated[float, Field(gt=0.0)]

    @property
    def scale(self) -> float:
        """Return the factor on what is added."""
        return self.alpha / self.rank

    @property
    def least_rank(self) -> int:
        """Return the least rank, of which others are multiples."""
        return 1

    def effective(self, run: Run) -> Budget:
        """Return the budget that identifies a run: one of parameters decides the rank."""
        return run.budget if run.budget.policy == "params" else super().effective(run)

    def sized(self, run: Run) -> Self:
        """Return the method at its own rank, or at that with which it trains as much as a budget's MoDE model.

        A rank that is raised keeps alpha / r, and so the scale of what is added.

        Raises:
            ConfigError: What it trains is not known, or no matter of the rank.
        """
        budget, least = run.budget, self.least_rank
        if budget.num_blocks is None or budget.expert_layers is None:
            return self
        wanted = sum(beside(shape_of(run.backbone), len(run.targets), budget.num_blocks, budget.expert_layers))
        one, two = self.trains(run, least), self.trains(run, 2 * least)
        if one == two:
            raise ConfigError("budget=params: adapters are on none of the matrices of decoder layers that it counts")
        return self.at(least * max(1, round(1 + (wanted - one) / (two - one))))

    def at(self, rank: int) -> Self:
        """Return the method at another rank."""
        changed: Self = replace(self, rank=rank, alpha=self.alpha * (rank / self.rank))
        return changed

    def trains(self, run: Run, rank: int) -> int:
        """Return the parameters that train at some rank."""
        cost = self.at(rank).cost(replace(run, budget=Budget(policy="paper")))
        if cost is None:
            raise ConfigError(f"budget=params: {type(self).__name__} does not say what it trains with these settings")
        return cost.trainable
