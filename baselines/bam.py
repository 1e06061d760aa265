"""BAM, Branch-Attend-Mix (Zhang et al., 2024): as BTX, but attention becomes experts too.

In every decoder layer the attention of the backbone and of its fully fine-tuned copies are mixed, sum_j g_j(x) A_j(x),
softly over all, each with keys and values of its own; a token has one feed-forward expert, whose output is multiplied
by its probability. All other weights are the mean of theirs, the routers are random, and everything trains on the mix,
with Switch's balance loss and the z-loss, whose weights are not published.

The published block runs attention and feed-forward part in parallel; here they stay in the backbone's order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.method import RouterSettings
from mode.config.run import Run
from mode.cost.flops import Cost, mixture_cost
from mode.methods.base import Material
from mode.methods.stages import Mixture, merge_branches

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class BAM(Mixture):
    """Branch, attend, mix.

    Attributes:
        router: How tokens choose a feed-forward expert.
        attention_router: How tokens weigh the attention experts: all of them, as published.
        shares_keys: Whether the attention experts of a layer share keys and values, whose maps are the mean of theirs.
    """

    recorded_as: ClassVar[str] = "baselines.bam.BAM"
    weighs_experts: ClassVar[bool] = True
    groups_tokens: ClassVar[bool] = True

    router: RouterSettings
    attention_router: RouterSettings
    shares_keys: bool

    def __post_init__(self) -> None:
        if self.attention_router.top_k is not None or self.attention_router.top_p is not None:
            raise ValueError("attention_router: all attention experts run, so there is no top_k or top_p")

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the mixture of the backbone and its branches."""
        import torch

        from mode.moe.attention import insert_attention_banks
        from mode.moe.feed_forward import insert_feed_forward_banks

        model, states = merge_branches(material)
        torch.manual_seed(run.seed)
        insert_feed_forward_banks(model, states, self.router)
        insert_attention_banks(model, states, self.attention_router, shares_keys=self.shares_keys)
        mixed: nn.Module = model
        return mixed

    def cost(self, run: Run) -> Cost | None:
        """Return what the mixture takes; not known where keys are shared, or with `router.top_p`."""
        if self.shares_keys or not self.router.known:
            return None
        shape, count = read_shape(run.backbone), len(run.targets) + 1
        return mixture_cost(shape, run.train.sequence_length, count, self.router.active, attentions=count)
