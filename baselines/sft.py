"""Full fine-tuning: all parameters train with next-token cross-entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.run import Budget, Run
from mode.cost.flops import Cost, compute_full_cost
from mode.methods.anchored import Adaptation
from mode.methods.base import Material

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class SFT(Adaptation):
    """Full fine-tuning (supervised, all parameters)."""

    recorded_as: ClassVar[str] = "baselines.sft.SFT"
    family: ClassVar[str] = "full tuning"
    source: ClassVar[str] = "common practice"
    identical_at_start: ClassVar[bool] = True

    def effective(self, run: Run) -> Budget:
        """Return the simplest budget. Budgets are measured by full fine-tuning, so it trains `train.steps` steps.

        With an anchor a step takes more operations, so equal operations are fewer steps.
        """
        anchored = self.anchor.source != "none"
        return run.budget if anchored and run.budget.policy == "compute" else Budget(policy="paper")

    def cost(self, run: Run) -> Cost:
        """Return the cost of full fine-tuning."""
        return compute_full_cost(read_shape(run.backbone), run.train.sequence_length)

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with every parameter trainable."""
        model: nn.Module = material.backbone().requires_grad_(True)
        return model
