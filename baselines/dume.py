"""DUME (Gensyn, 2026): BTX without training. Its routers are solved by ridge regression.

In every decoder layer, the feed-forward parts of the backbone and of its fully fine-tuned copies are the experts. All
other weights are the mean over the models. A router's weights are

    W = (X^T X + ridge I)^-1 X^T Y,

with the router's inputs X on text of every expert and the one-hot experts Y of these texts; the row of every expert is
then scaled to unit length. X^T X and X^T Y are sums over texts, so an expert joins by adding its own. A token goes to
one expert.

The inputs of a layer depend on the layers before it: there a text goes to its own expert. The backbone's text is
sampled from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import Flops, read_shape
from mode.config.base import STRICT
from mode.config.check import build_method
from mode.config.method import RouterSettings
from mode.config.run import Run
from mode.cost.flops import Cost, compute_mixture_cost
from mode.methods.base import Material, Method
from mode.methods.stages import merge_branches, stages_by_domain

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class DUME(Method):
    """A mixture of the backbone and of its fine-tuned copies, with solved routers.

    Attributes:
        branch: The method that trains a copy on a domain, as in its YAML: full fine-tuning.
        router: Settings of the routers.
        ridge: Factor on the squared weights of a router in its regression.
        rows: Maximum number of rows of every text of the regression.
    """

    recorded_as: ClassVar[str] = "baselines.dume.DUME"
    family: ClassVar[str] = "mixtures from dense models"
    source: ClassVar[str] = "Gensyn, 2026"
    weighs_experts: ClassVar[bool] = True
    groups_tokens: ClassVar[bool] = True

    branch: dict[str, Any]
    router: RouterSettings
    ridge: Annotated[float, Field(gt=0)]
    rows: Annotated[int, Field(gt=0)]

    def unused(self) -> tuple[str, ...]:
        """Return the settings that do not matter: nothing trains in this stage, so there is no learning rate."""
        return ("lr",)

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return one run of fine-tuning per target."""
        return stages_by_domain(run, build_method(self.branch, "method.branch"), run.targets, trains=False)

    def steps(self, run: Run) -> int:
        """Return 0: only the earlier stages train."""
        return 0

    def branches(self, run: Run) -> tuple[str, ...]:
        """Return the names of the models that become the experts."""
        return "backbone", *run.targets

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the mixture of the backbone and its branches."""
        from mode.moe.feed_forward import insert_feed_forward_banks
        from mode.moe.solved_routers import solve_routers

        model, states = merge_branches(material)
        banks = insert_feed_forward_banks(model, states, self.router)
        solve_routers(model.eval(), banks, material.read_texts(self.rows), self.ridge)
        mixed: nn.Module = model.requires_grad_(False)
        return mixed

    def cost(self, run: Run) -> Cost | None:
        """Return the cost of a forward pass; None if the number of experts per token is not fixed (`router.top_p`)."""
        if not self.router.known:
            return None
        shape, count = read_shape(run.backbone), len(run.targets) + 1
        trained = compute_mixture_cost(shape, run.train.sequence_length, count, self.router.active)
        return replace(trained, flops=Flops(trained.flops.forward, 0.0), trainable=0)
