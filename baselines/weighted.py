"""Full fine-tuning that weighs its own loss by losses of frozen models: FLOW, STM and Rho-1.

L = sum_t w_t CE_t / N over the N tokens of a step. The weights of a step do not depend on the number of micro-batches.

FLOW (Sanyal et al., 2025, arXiv 2502.02797): every row i has the weight exp(-l_i / tau). l_i is its mean loss under the
untouched backbone, and tau is the median of l over all rows that the run trains on. The weights are computed once,
before the first step. The publication derives them from a linear program over distributions of the samples with an
entropy term, so they are those of a softmax, up to a constant factor. Here the factor makes their mean over all rows 1.

STM, selective token masking (Wu et al., 2025, arXiv 2501.14315): no loss on tokens whose perplexity under the untouched
backbone, exp(CE_t), is above tau. The loss is the mean over the other tokens of a step.

Rho-1 (Lin et al., 2024, arXiv 2404.07965): loss on the share of a step's tokens with the largest excess loss, which is
the loss of the model that trains minus the loss of a reference model. The loss is the mean over these tokens.
"""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.check import build_method, replace_settings
from mode.config.run import Budget, Run
from mode.core.errors import ConfigError
from mode.core.files import WEIGHTS
from mode.cost.flops import Cost, compute_full_cost, compute_untouched_cost
from mode.methods.base import Material, Method, TokenWeights, Weighing
from mode.methods.stages import stage_on_targets

if TYPE_CHECKING:
    from torch import Tensor, nn


@settings(frozen=True, kw_only=True, config=STRICT)
class WeightedTuning(Method):
    """Full fine-tuning with weights of tokens."""

    family: ClassVar[str] = "full tuning"
    identical_at_start: ClassVar[bool] = True
    forwards: ClassVar[int] = 1
    """Forward passes per token that the weights take."""

    def effective(self, run: Run) -> Budget:
        """Return the simplest budget. A step takes more operations than one of full fine-tuning."""
        return run.budget if run.budget.policy == "compute" else Budget(policy="paper")

    def cost(self, run: Run) -> Cost:
        """Return the cost of full fine-tuning. `anchoring_flops` adds the losses that the weights are computed from."""
        return compute_full_cost(read_shape(run.backbone), run.train.sequence_length)

    def anchoring_flops(self, run: Run) -> float:
        """Return the operations of the losses that the weights are computed from, per token."""
        untouched = compute_untouched_cost(read_shape(run.backbone), run.train.sequence_length)
        return self.forwards * untouched.flops.forward

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with every parameter trainable."""
        model: nn.Module = material.backbone().requires_grad_(True)
        return model


@settings(frozen=True, kw_only=True, config=STRICT)
class FLOW(WeightedTuning):
    """Full fine-tuning, with larger weights of the rows that the backbone predicts well."""

    recorded_as: ClassVar[str] = "baselines.weighted.FLOW"
    source: ClassVar[str] = "Sanyal et al., 2025"

    def weigh(self, weighing: Weighing) -> TokenWeights:
        """Return a function that gives all tokens of a row the weight of the row."""
        found: list[Tensor] = []

        def find_weights(step: int, rows: Tensor) -> Tensor:
            if not found:
                found.append(self.weigh_rows(weighing))
            return found[0][step, :, None].expand_as(rows[:, 1:])

        return find_weights

    def weigh_rows(self, weighing: Weighing) -> Tensor:
        """Return the weights of all rows of the run, (steps, B), whose mean is 1."""
        import numpy as np
        import torch

        backbone, steps = weighing.backbone(), range(weighing.steps)
        rows = torch.stack([weighing.score(backbone, weighing.rows(step)).mean(dim=1) for step in steps])
        losses = rows.cpu().double()
        weights = torch.exp(-losses / float(np.median(losses.numpy())))
        return (weights / weights.mean()).to(rows)


@settings(frozen=True, kw_only=True, config=STRICT)
class STM(WeightedTuning):
    """Full fine-tuning on the tokens that the backbone predicts well.

    Attributes:
        tau: Largest perplexity under the backbone of a token that trains.
    """

    recorded_as: ClassVar[str] = "baselines.weighted.STM"
    source: ClassVar[str] = "Wu et al., 2025"

    tau: Annotated[float, Field(ge=1)]

    def weigh(self, weighing: Weighing) -> TokenWeights:
        """Return a function that gives tokens of a larger perplexity than `tau` the weight 0."""
        backbone, limit = weighing.backbone(), math.log(self.tau)
        return lambda step, rows: spread(weighing.score(backbone, rows) <= limit)


@settings(frozen=True, kw_only=True, config=STRICT)
class RhoOne(WeightedTuning):
    """Full fine-tuning on the tokens with the largest excess loss over a reference model.

    Attributes:
        reference: Method that trains the reference model on the same targets, with the settings of its YAML file.
        share: Share of a step's tokens that train.
    """

    recorded_as: ClassVar[str] = "baselines.weighted.RhoOne"
    source: ClassVar[str] = "Lin et al., 2024"
    forwards: ClassVar[int] = 2
    """The reference model's forward pass, and one of the model that trains, before the weights are known."""

    reference: dict[str, Any]
    share: Annotated[float, Field(gt=0, le=1)]

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return the run that trains the reference model: on half the steps, unless the budget is for every stage."""
        if run.budget.shares_steps or run.budget.policy == "compute":
            run = replace_settings(run, train=replace_settings(run.train, steps=run.train.steps // 2))
        return (stage_on_targets(run, build_method(self.reference, "method.reference")),)

    def effective(self, run: Run) -> Budget:
        """Return the simplest budget with the same result: that of a method with several stages."""
        return Method.effective(self, run)

    def order(self, run: Run) -> int:
        """Return the number of a row order of its own, so that the reference model is not scored on its own rows.

        With a limit on different rows (`train.batch.examples`) both models train on the same rows.
        """
        own = super().order(run)
        return own if run.train.batch.examples else zlib.crc32(f"reference,{own}".encode())

    def weigh(self, weighing: Weighing) -> TokenWeights:
        """Return a function that gives all tokens but those with the largest excess loss the weight 0.

        Raises:
            ConfigError: `reference` does not train exactly the parameters of the backbone.
        """
        import torch

        reference = self.load_reference(weighing)

        def find_weights(step: int, rows: Tensor) -> Tensor:
            excess = weighing.score(weighing.model, rows) - weighing.score(reference, rows)
            count = max(1, round(self.share * excess.numel()))
            kept = excess.new_zeros(excess.numel(), dtype=torch.bool)
            kept[excess.flatten().topk(count).indices] = True
            return spread(kept.view_as(excess))

        return find_weights

    def load_reference(self, weighing: Weighing) -> nn.Module:
        """Return the frozen reference model.

        Raises:
            ConfigError: `reference` does not train exactly the parameters of the backbone.
        """
        from mode.core.tensors import load_run_tensors

        model: nn.Module = weighing.backbone()
        parameters, (folder,) = dict(model.named_parameters()), weighing.needs()
        trained = load_run_tensors(folder / WEIGHTS, folder.name)
        if set(trained) != set(parameters):
            target = self.reference["_target_"]
            raise ConfigError(f"method.reference._target_={target}: not a method that trains all weights")
        for name, parameter in parameters.items():
            parameter.data.copy_(trained[name])
        return model


def spread(kept: Tensor) -> Tensor:
    """Return equal weights of the tokens that train, and 0 for the others, so that their mean is 1, (B, S).

    Args:
        kept: Whether a token trains, (B, S). If none does, all weights are 0.
    """
    return kept.float() * (kept.numel() / kept.sum().clamp(min=1))
