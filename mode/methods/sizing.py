"""Adapters whose number of parameters can be matched to that of MoDE."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.check import replace_settings
from mode.config.run import Budget, Run
from mode.core.errors import ConfigError
from mode.cost.modular import count_added
from mode.methods.anchored import Adaptation


@settings(frozen=True, kw_only=True, config=STRICT)
class ParameterMatched(Adaptation):
    """A method whose number of added parameters is linear in one size, such as a rank."""

    @property
    def least(self) -> int:
        """Return the smallest size; all sizes are multiples of it."""
        return 1

    def at(self, size: int) -> Self:
        """Return the method at another size."""
        raise NotImplementedError

    def effective(self, run: Run) -> Budget:
        """Return the budget that identifies a run; a budget of parameters decides the size."""
        return run.budget if run.budget.policy == "params" else super().effective(run)

    def sized(self, run: Run) -> Self:
        """Return the method at its own size or, with a budget of parameters, at the size that matches a MoDE model.

        Raises:
            ConfigError: The added parameters are unknown, or do not depend on the size.
        """
        budget, least = run.budget, self.least
        if budget.num_blocks is None or budget.expert_layers is None:
            return self
        wanted = sum(count_added(read_shape(run.backbone), len(run.targets), budget.num_blocks, budget.expert_layers))
        one, two = self.adds(run, least), self.adds(run, 2 * least)
        if one == two:
            raise ConfigError("budget=params: adapters are on none of the matrices of decoder layers that it counts")
        return self.at(least * max(1, round(1 + (wanted - one) / (two - one))))

    def adds(self, run: Run, size: int) -> int:
        """Return the parameters added to the backbone's at a size, trained in this stage or in an earlier one."""
        cost = self.at(size).cost(replace_settings(run, budget=Budget(policy="paper")))
        if cost is None:
            raise ConfigError(f"budget=params: {type(self).__name__} does not say what it adds with these settings")
        return cost.added


@settings(frozen=True, kw_only=True, config=STRICT)
class LowRank(ParameterMatched):
    """A method that adds low-rank matrices, products of two thin ones.

    Attributes:
        rank: r.
        alpha: Numerator of the scale alpha / r.
    """

    rank: Annotated[int, Field(gt=0)]
    alpha: Annotated[float, Field(gt=0.0)]

    @property
    def scale(self) -> float:
        """Return the factor on the low-rank matrices, alpha / r."""
        return self.alpha / self.rank

    def at(self, rank: int) -> Self:
        """Return the method at another rank, with the same alpha / r."""
        changed: Self = replace_settings(self, rank=rank, alpha=self.alpha * (rank / self.rank))
        return changed
