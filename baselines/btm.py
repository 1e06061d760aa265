"""BTM, Branch-Train-Merge (Li et al., 2022): models trained on one domain each, combined without further training.

- `combine=posterior`: p(x_t | x_<t) = sum_j w_j p_j(x_t | x_<t), where w_j is the posterior probability of model j
  given x_<t, proportional to p_j(x_<t). `top_k` keeps the most probable models.
- `combine=uniform`: the same mixture with equal weights.
- `combine=average`: one model whose weights are the mean over all models.

With `branch_data=mix` there is one branch, trained on the mix of all targets: a fine-tuned model beside its backbone.

The published prior over domains is estimated on text of the scored domain. In this implementation the domain is not
given: the prior at the beginning of a row is uniform, and only the tokens of the row change the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.check import build_method
from mode.config.method import Choice
from mode.config.run import Budget, Run
from mode.core.files import WEIGHTS
from mode.cost.flops import Cost, add_flops, compute_untouched_cost
from mode.methods.base import Material, Method
from mode.methods.stages import stage_on_targets, stages_by_domain

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class BTM(Method):
    """Branch, train, merge.

    Attributes:
        branch: Method that trains a branch, with the settings of its YAML file: full fine-tuning.
        branch_data: Training data of the branches: `domain`, one branch per target, as published; `mix`, one branch on
            the mix of all targets.
        combine: Combination of the models: `posterior`, `uniform` or `average`.
        top_k: Number of models to keep per token, with `posterior`; None for all.
        backbone: Whether the backbone is one of the models.
        window: Number of last tokens that the posterior is given, for text whose domain changes; null for all tokens of
            the row, as published.
    """

    recorded_as: ClassVar[str] = "baselines.btm.BTM"
    family: ClassVar[str] = "models apart"
    source: ClassVar[str] = "Li et al., 2022"

    branch: dict[str, Any]
    combine: Literal["posterior", "uniform", "average"]
    top_k: Annotated[int, Field(gt=0)] | None
    backbone: bool
    window: Annotated[int, Field(gt=0)] | None = None
    branch_data: Literal["domain", "mix"] = "domain"

    def __post_init__(self) -> None:
        if self.top_k is not None and self.combine != "posterior":
            raise ValueError("top_k goes with combine=posterior")
        if self.window is not None and self.combine != "posterior":
            raise ValueError("window goes with combine=posterior")

    @property
    def weighs_experts(self) -> bool:
        """Whether the models stay apart and are weighed token by token."""
        return self.combine != "average"

    def unused(self) -> tuple[str, ...]:
        """Return the settings that do not matter: nothing trains in this stage, so there is no learning rate."""
        return ("lr",)

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return one run of full fine-tuning per target, or one on the mix of all targets."""
        if self.branch_data == "mix":
            return (stage_on_targets(run, build_method(self.branch, "method.branch")),)
        return stages_by_domain(run, build_method(self.branch, "method.branch"), run.targets, trains=False)

    def steps(self, run: Run) -> int:
        """Return 0: only the earlier stages train."""
        return 0

    def effective(self, run: Run) -> Budget:
        """Return the simplest budget: with one branch, that of its training."""
        return self.needs(run)[0].budget if self.branch_data == "mix" else super().effective(run)

    def branches(self, run: Run) -> tuple[str, ...]:
        """Return the names of the combined models."""
        tuned = run.targets if self.branch_data == "domain" else ("mix",)
        return ("backbone", *tuned) if self.backbone else tuned

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the combination of the models."""
        from mode.core.tensors import average_weights, load_run_tensors
        from mode.gating.router import Posterior
        from mode.moe.ensemble import Ensemble

        members = [material.backbone().requires_grad_(False) for _ in material.needs]
        for member, folder in zip(members, material.needs, strict=True):
            state = load_run_tensors(folder / WEIGHTS, folder.name, dict(member.named_parameters()))
            member.load_state_dict(state, strict=False)  # a tied head has one name
        if self.backbone:
            members.insert(0, material.backbone().requires_grad_(False))
        if self.combine == "average":
            model = material.backbone().requires_grad_(False)
            model.load_state_dict(
                average_weights([dict(member.named_parameters()) for member in members]), strict=False
            )
            return model  # type: ignore[no-any-return]
        posterior = Posterior(Choice(top_k=self.top_k), self.window) if self.combine == "posterior" else None
        mixture: nn.Module = Ensemble(members, posterior)
        return mixture

    def cost(self, run: Run) -> Cost:
        """Return the cost of a forward pass of all models. Nothing trains."""
        one = compute_untouched_cost(read_shape(run.backbone), run.train.sequence_length)
        count = 1 if self.combine == "average" else len(self.branches(run))
        total = count * one.total
        return Cost(
            flops=add_flops([one.flops] * count), total=total, trainable=0, added=total - one.total, active=total
        )
