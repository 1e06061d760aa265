"""Sparse Upcycling (Komatsuzaki et al., 2023): every feed-forward layer becomes N copies of itself behind a router.

All other weights are copied, and all weights train. As published for decoders, a token goes to two experts, and the
weights of these experts are not renormalized after the softmax. The initial model then differs from the backbone. With
`method.router.renormalize=true` the initial model equals the backbone. Copies are equal at first and diverge because
they receive different tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.method import RouterSettings
from mode.config.run import Run
from mode.cost.flops import Cost, compute_mixture_cost
from mode.methods.anchored import Adaptation
from mode.methods.base import Material

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class SparseUpcycling(Adaptation):
    """A mixture of experts made from one dense model.

    Attributes:
        num_experts: Number of experts, N.
        router: Settings of the router.
    """

    recorded_as: ClassVar[str] = "baselines.upcycling.SparseUpcycling"
    family: ClassVar[str] = "mixtures from dense models"
    source: ClassVar[str] = "Komatsuzaki et al., 2023"
    weighs_experts: ClassVar[bool] = True
    groups_tokens: ClassVar[bool] = True

    num_experts: Annotated[int, Field(gt=0)]
    router: RouterSettings

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the upcycled backbone with all parameters trainable."""
        import torch

        from mode.moe.feed_forward import insert_feed_forward_banks

        model = material.backbone().requires_grad_(True)
        torch.manual_seed(run.seed)
        insert_feed_forward_banks(model, [None] * self.num_experts, self.router)
        upcycled: nn.Module = model
        return upcycled

    def cost(self, run: Run) -> Cost | None:
        """Return the cost of the mixture; None if the number of experts per token is not fixed (`router.top_p`)."""
        if not self.router.known:
            return None
        shape = read_shape(run.backbone)
        return compute_mixture_cost(shape, run.train.sequence_length, self.num_experts, self.router.active)
