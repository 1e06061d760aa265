"""BTM, Branch-Train-Merge (Li et al., 2022): models trained a domain each, and no training after that.

`combine=posterior`: p(x_t | x_<t) = sum_j w_j p_j(x_t | x_<t), where w_j is the probability that model j wrote x_<t,
proportional to p_j(x_<t); `top_k` keeps the most probable models. `uniform`: the same with equal weights.
`average`: one model whose weights are the mean of all.

The published prior over domains is estimated on text of the domain that is scored. Here nothing tells which that is, so
all are as likely at the beginning of a row, and its own tokens decide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.check import build_method
from mode.config.method import Choice
from mode.config.run import Run
from mode.core.files import WEIGHTS
from mode.cost.flops import Cost, add_flops, untouched_cost
from mode.methods.base import Material, Method
from mode.methods.stages import stages_by_domain

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class BTM(Method):
    """Branch, train, merge.

    Attributes:
        branch: The method that trains a model on a domain, as its YAML has it: full fine-tuning.
        combine: How the models become one.
        top_k: Models that stay, of `posterior`.
        backbone: Whether the backbone is one of the models.
    """

    recorded_as: ClassVar[str] = "baselines.btm.BTM"

    branch: dict[str, Any]
    combine: Literal["posterior", "uniform", "average"]
    top_k: Annotated[int, Field(gt=0)] | None
    backbone: bool

    def __post_init__(self) -> None:
        if self.top_k is not None and self.combine != "posterior":
            raise ValueError("top_k goes with combine=posterior")

    @property
    def weighs_experts(self) -> bool:
        """Whether the models stay apart and are weighed token by token."""
        return self.combine != "average"

    def unused(self) -> tuple[str, ...]:
        """Nothing trains here, so there is no learning rate."""
        return ("lr",)

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return one run of full fine-tuning per target."""
        return stages_by_domain(run, build_method(self.branch), run.targets, trains=False)

    def steps(self, run: Run) -> int:
        """Return 0: what trains are the stages before."""
        return 0

    def branches(self, run: Run) -> tuple[str, ...]:
        """Return the names of the models that are mixed."""
        return ("backbone", *run.targets) if self.backbone else run.targets

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the models as one."""
        from mode.core.tensors import average_weights, load_tensors
        from mode.gating.router import Posterior
        from mode.moe.ensemble import Ensemble

        states = [load_tensors(folder / WEIGHTS)[0] for folder in material.needs]
        members = [material.backbone().requires_grad_(False) for _ in states]
        for member, state in zip(members, states, strict=True):
            member.load_state_dict(state, strict=False)  # a tied head has one name
        if self.backbone:
            members.insert(0, material.backbone().requires_grad_(False))
        if self.combine == "average":
            model = material.backbone().requires_grad_(False)
            model.load_state_dict(
                average_weights([dict(member.named_parameters()) for member in members]), strict=False
            )
            return model  # type: ignore[no-any-return]
        posterior = Posterior(Choice(top_k=self.top_k)) if self.combine == "posterior" else None
        mixture: nn.Module = Ensemble(members, posterior)
        return mixture

    def cost(self, run: Run) -> Cost:
        """Return what a forward pass of all models takes; nothing trains."""
        one = untouched_cost(read_shape(run.backbone), run.train.sequence_length)
        count = 1 if self.combine == "average" else len(run.targets) + self.backbone
        total = count * one.total
        return Cost(
            flops=add_flops([one.flops] * count), total=total, trainable=0, added=total - one.total, active=total
        )
