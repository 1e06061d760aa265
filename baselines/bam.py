"""BAM, Branch-Attend-Mix (Zhang et al., 2024): as BTX, with experts of attention too.

In every decoder layer, the attention of the backbone and of its fully fine-tuned copies is mixed, sum_j g_j(x) A_j(x).
All attention experts run, each with its own keys and values. A token goes to one feed-forward expert, whose output is
multiplied by its probability. All other weights are the mean over the models, and the routers are random. Then all
weights train on the mix, with the balance loss of the Switch Transformer and the z-loss. The paper does not give the
weights of these losses.

The published block runs attention and the feed-forward part in parallel. Here they keep the backbone's order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.method import RouterSettings
from mode.config.run import Run
from mode.cost.flops import Cost, compute_mixture_cost
from mode.methods.base import Material
from mode.methods.stages import Mixture, merge_branches

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class BAM(Mixture):
    """Branch, attend, mix.

    Attributes:
        router: Settings of the router of feed-forward experts.
        attention_router: Settings of the router of attention experts. All attention experts run, as published.
        shares_keys: Whether the attention experts of a layer share keys and values, with the mean of their projections.
    """

    recorded_as: ClassVar[str] = "baselines.bam.BAM"
    family: ClassVar[str] = "mixtures from dense models"
    source: ClassVar[str] = "Zhang et al., 2024"
    weighs_experts: ClassVar[bool] = True
    groups_tokens: ClassVar[bool] = True

    router: RouterSettings
    attention_router: RouterSettings
    shares_keys: bool

    def __post_init__(self) -> None:
        if self.attention_router.top_k is not None or self.attention_router.top_p is not None:
            raise ValueError("attention_router: all attention experts run, so top_k and top_p must be null")

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
        """Return the cost of the mixture; None with `shares_keys` or `router.top_p`."""
        if self.shares_keys or not self.router.known:
            return None
        shape, count = read_shape(run.backbone), len(run.targets) + 1
        return compute_mixture_cost(shape, run.train.sequence_length, count, self.router.active, attentions=count)
