"""Sparse Upcycling (Komatsuzaki et al., 2023): every feed-forward layer becomes N copies of itself behind a router.

All else is copied and everything trains as the dense model did. As published for decoders a token goes to two experts,
whose weights keep what the softmax gave them: the model does not start as the backbone then, and does with
`method.router.renormalize=true`. Copies are the same at first; they grow apart by the tokens that are sent to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.method import RouterSettings
from mode.config.run import Run
from mode.cost.flops import Cost, mixture_cost
from mode.methods.anchored import Adaptation
from mode.methods.base import Material

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class SparseUpcycling(Adaptation):
    """A mixture of experts made of one dense model.

    Attributes:
        num_experts: N.
        router: How tokens choose.
    """

    recorded_as: ClassVar[str] = "baselines.upcycling.SparseUpcycling"
    weighs_experts: ClassVar[bool] = True
    groups_tokens: ClassVar[bool] = True

    num_experts: Annotated[int, Field(gt=0)]
    router: RouterSettings

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the upcycled backbone, all of which trains."""
        import torch

        from mode.moe.feed_forward import insert_feed_forward_banks

        model = material.backbone().requires_grad_(True)
        torch.manual_seed(run.seed)
        insert_feed_forward_banks(model, [None] * self.num_experts, self.router)
        upcycled: nn.Module = model
        return upcycled

    def cost(self, run: Run) -> Cost | None:
        """Return what the mixture takes; not known where the number of a token's experts is not."""
        if not self.router.known:
            return None
        shape = read_shape(run.backbone)
        return mixture_cost(shape, run.train.sequence_length, self.num_experts, self.router.active)
