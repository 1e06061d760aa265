"""L2-SP (Li et al., 2018): full fine-tuning with a penalty on the squared distance from the backbone's weights.

L = cross-entropy + (weight / 2) ||theta - theta_0||^2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.run import Budget, Run
from mode.cost.flops import Cost, compute_full_cost
from mode.methods.base import Material, Method

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@settings(frozen=True, kw_only=True, config=STRICT)
class L2SP(Method):
    """Full fine-tuning, held near the backbone's weights.

    Attributes:
        weight: Factor on the penalty; 0 is full fine-tuning.
    """

    recorded_as: ClassVar[str] = "baselines.l2_sp.L2SP"
    family: ClassVar[str] = "regularised tuning"
    source: ClassVar[str] = "Li et al., 2018"
    identical_at_start: ClassVar[bool] = True

    weight: Annotated[float, Field(ge=0)]

    def effective(self, run: Run) -> Budget:
        """Return the simplest budget. Budgets are measured by full fine-tuning, so it trains `train.steps` steps."""
        return Budget(policy="paper")

    def cost(self, run: Run) -> Cost:
        """Return the cost of full fine-tuning. The penalty takes a few operations per weight and step."""
        return compute_full_cost(read_shape(run.backbone), run.train.sequence_length)

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with every parameter trainable, and the penalty as a module of it."""
        from mode.ops.penalty import WeightPenalty

        model: Any = material.backbone().requires_grad_(True)
        model.weight_penalty = WeightPenalty(model, self.weight)
        penalised: nn.Module = model
        return penalised

    def plain(self, model: Any) -> PreTrainedModel:
        """Return the model without the penalty."""
        del model.weight_penalty
        plain: PreTrainedModel = model
        return plain
