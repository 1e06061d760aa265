"""EWC, elastic weight consolidation (Kirkpatrick et al., 2017): full fine-tuning that protects important weights.

L = cross-entropy + (weight / 2) sum_i F_i (theta_i - theta_i^0)^2, F the diagonal of the backbone's Fisher information.

F is estimated on rows that are sampled from the backbone, so no text of its pretraining is needed. It is per token,
so that the penalty is the diagonal, quadratic part of `weight` times KL(backbone || model), the anchor's term.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.load import fingerprint_weights
from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.method import SELF, Anchor
from mode.config.run import Budget, Run
from mode.cost.flops import Cost, compute_full_cost
from mode.methods.base import Material, Method

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@settings(frozen=True, kw_only=True, config=STRICT)
class EWC(Method):
    """Full fine-tuning, held near the backbone's weights by their importance.

    Attributes:
        weight: Factor on the penalty; 0 is full fine-tuning.
        rows: Number of sampled rows that the importance is estimated on.
    """

    recorded_as: ClassVar[str] = "baselines.ewc.EWC"
    family: ClassVar[str] = "regularised tuning"
    source: ClassVar[str] = "Kirkpatrick et al., 2017"
    identical_at_start: ClassVar[bool] = True

    weight: Annotated[float, Field(ge=0)]
    rows: Annotated[int, Field(gt=1)]

    def effective(self, run: Run) -> Budget:
        """Return the simplest budget. Budgets are measured by full fine-tuning, so it trains `train.steps` steps."""
        return Budget(policy="paper")

    def cost(self, run: Run) -> Cost:
        """Return the cost of full fine-tuning. Sampling and the importance are not counted."""
        return compute_full_cost(read_shape(run.backbone), run.train.sequence_length)

    def old_text(self, run: Run) -> tuple[str, ...]:
        """Return the sources of old text: replay, and the sampled rows that the importance is estimated on."""
        return (*super().old_text(run), SELF)

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with every parameter trainable, and the penalty as a module of it."""
        from mode.ops.penalty import WeightPenalty

        def estimate() -> dict[str, Tensor]:
            return self.estimate_importance(run, material)

        model: Any = material.backbone().requires_grad_(True)
        model.weight_penalty = WeightPenalty(model, self.weight, estimate)
        penalised: nn.Module = model
        return penalised

    def estimate_importance(self, run: Run, material: Material) -> dict[str, Tensor]:
        """Return the diagonal of the Fisher information of the backbone, by name, on the CPU."""
        import torch

        from mode.ops.penalty import estimate_fisher
        from mode.train.anchor_rows import load_or_sample_rows

        length, cache = run.train.sequence_length, Path(run.paths.cache).expanduser()
        anchor = Anchor(source=SELF, rows=self.rows)
        cpu = torch.device("cpu")
        stream = load_or_sample_rows(anchor, run.backbone, fingerprint_weights(run.backbone), length, cache, cpu)
        rows = torch.from_numpy(stream.astype("int64")).view(self.rows, length)
        return estimate_fisher(material.backbone().eval().requires_grad_(True), rows)

    def plain(self, model: Any) -> PreTrainedModel:
        """Return the model without the penalty."""
        del model.weight_penalty
        plain: PreTrainedModel = model
        return plain
