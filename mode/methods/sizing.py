"""Adapters whose size can be matched to that of MoDE."""

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
    """A method of which one number, such as a rank, decides how many parameters it adds, in proportion."""

    @property
    def least(self) -> int:
        """Return the least size, of which others are multiples."""
        return 1

    def at(self, size: int) -> Self:
        """Return the method at another size."""
        raise NotImplementedError

    def effective(self, run: Run) -> Budget:
        """Return the budget that identifies a run: one of parameters decides the size."""
        return run.budget if run.budget.policy == "params" else super().effective(run)

    def sized(self, run: Run) -> Self:
        """Return the method at its own size, or at that with which it adds as much as a budget's MoDE model.

        Raises:
            ConfigError: What it adds is not known, or no matter of the size.
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
        """Return the parameters beside the backbone's at some size, trained in this stage or in an earlier one."""
        cost = self.at(size).cost(replace_settings(run, budget=Budget(policy="paper")))
        if cost is None:
            raise ConfigError(f"budget=params: {type(self).__name__} does not say what it adds with these settings")
        return cost.added


@settings(frozen=True, kw_only=True, config=STRICT)
class LowRank(ParameterMatched):
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

    def at(self, rank: int) -> Self:
        """Return the method at another rank; alpha / r, and so the scale of what is added, stays."""
        changed: Self = replace_settings(self, rank=rank, alpha=self.alpha * (rank / self.rank))
        return changed
