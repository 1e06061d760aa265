"""BTX, Branch-Train-MiX (Sukhbaatar et al., 2024): models trained on one domain each become experts of a mixture.

In every decoder layer, the feed-forward parts of the backbone and of its fully fine-tuned copies are the experts of
FF(x) = sum_i g_i FF_i(x), g = softmax(TopK(W x)). All other weights are the mean over the models, and the router is
random. Then all weights train on the mix, with the load-balancing loss alpha N sum_i f_i P_i.

The mix consists of the target domains. The published mix includes pretraining data (`train.batch.replay` adds a
domain).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.check import replace_settings
from mode.config.method import RouterSettings
from mode.config.run import Run
from mode.cost.flops import Cost, compute_mixture_cost
from mode.methods.base import Material
from mode.methods.stages import Mixture, merge_branches

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class BTX(Mixture):
    """Branch, train, mix.

    Attributes:
        router: Settings of the router. Without `top_k` all experts run, the published soft routing.
        train_experts: Whether the experts train on the mix, or only the other weights.
        soft_layers: Number of first layers in which all experts run if the router samples (`router.sample`).
    """

    recorded_as: ClassVar[str] = "baselines.btx.BTX"
    family: ClassVar[str] = "mixtures from dense models"
    source: ClassVar[str] = "Sukhbaatar et al., 2024"
    weighs_experts: ClassVar[bool] = True
    groups_tokens: ClassVar[bool] = True

    router: RouterSettings
    train_experts: bool
    soft_layers: Annotated[int, Field(ge=0)] = 0

    def unused(self) -> tuple[str, ...]:
        """Return the settings that do not matter: `soft_layers` only matters if the router samples."""
        return (*super().unused(), *(() if self.router.sample else ("soft_layers",)))

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the mixture of the backbone and its branches."""
        import torch

        from mode.moe.feed_forward import insert_feed_forward_banks

        model, states = merge_branches(material)
        torch.manual_seed(run.seed)
        for number, bank in enumerate(insert_feed_forward_banks(model, states, self.router)):
            bank.experts.requires_grad_(self.train_experts)
            if number < self.soft:
                bank.router.settings = replace_settings(self.router, sample=False)
        mixed: nn.Module = model
        return mixed

    def cost(self, run: Run) -> Cost | None:
        """Return the cost of the mixture; None if the number of experts per token is not fixed (`router.top_p`)."""
        if not self.router.known:
            return None
        shape, count = read_shape(run.backbone), len(run.targets) + 1
        length = run.train.sequence_length
        active = self.router.active
        return compute_mixture_cost(
            shape, length, count, active, experts_train=self.train_experts, soft_layers=self.soft
        )

    @property
    def soft(self) -> int:
        """Number of first layers in which all experts run although the router samples in the others."""
        return self.soft_layers if self.router.sample else 0
