"""LoRAMoE (Dou et al., 2023): low-rank experts of two kinds on a frozen feed-forward part, balanced within their kind.

At every matrix of a feed-forward part y = W0 x + (alpha / r) sum_i w_i B_i A_i x, with w = softmax(W x) over all N
experts. Every matrix has its own router. Half of the experts are for rows of world knowledge, and half for rows of
other tasks. The localized balancing constraint, beta var(Z) / mean(Z)^2, allows larger weights of experts on rows of
their own kind.

Replayed and anchored rows are of the first kind, and rows of the targets of the second. Without replayed and anchored
rows the targets alternate between the kinds, which differs from the paper. The published dropout of 0.05 is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import Layer, read_shape
from mode.config.base import STRICT
from mode.config.run import Run
from mode.cost.adapters import compute_bank_cost
from mode.cost.flops import Cost
from mode.methods.base import Material
from mode.methods.sizing import LowRank

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class LoRAMoE(LowRank):
    """Low-rank experts of two kinds.

    Attributes:
        num_experts: Number of experts, N. Half of them are of each kind.
        balance: Weight of the localized balancing constraint, beta.
        spread: Extra importance of an expert on rows of its own kind, delta.
    """

    recorded_as: ClassVar[str] = "baselines.loramoe.LoRAMoE"
    family: ClassVar[str] = "mixtures of low rank"
    source: ClassVar[str] = "Dou et al., 2023"
    weighs_experts: ClassVar[bool] = True
    identical_at_start: ClassVar[bool] = True

    num_experts: Annotated[int, Field(gt=1, multiple_of=2)]
    balance: Annotated[float, Field(ge=0.0)]
    spread: Annotated[float, Field(ge=0.0, lt=1.0)]

    def row_kinds(self, run: Run) -> Mapping[str, int]:
        """Return the kind, 0 or 1, of every source of rows."""
        sources = self.mixture(run)
        if set(sources) - set(run.targets):
            return {name: int(name in run.targets) for name in sources}
        return {name: number % 2 for number, name in enumerate(run.targets)}

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with experts at its feed-forward parts. Only experts and routers train."""
        import torch

        from mode.gating.router import LocalizedRouter
        from mode.moe.low_rank import LowRankBank, read_linear_size, replace_linears

        model: nn.Module = material.backbone()
        model.requires_grad_(False)
        torch.manual_seed(run.seed)
        rank = self.sized(run).rank

        def make(path: str, base: nn.Module) -> nn.Module:
            router = LocalizedRouter(read_linear_size(base)[0], self.num_experts, self.balance, self.spread)
            bank = LowRankBank(base, self.num_experts, rank, self.scale, router)
            torch.nn.init.kaiming_uniform_(bank.down.flatten(0, 1), a=math.sqrt(5))  # as in LoRA
            return bank

        replace_linears(model, list_feed_forward(read_shape(run.backbone).layers[0]), make)
        return model

    def cost(self, run: Run) -> Cost:
        """Return the cost with experts and routers on a frozen backbone."""
        shape, length = read_shape(run.backbone), run.train.sequence_length
        return compute_bank_cost(shape, length, self.num_experts, self.sized(run).rank, list_feed_forward)


def list_feed_forward(layer: Layer) -> list[str]:
    """Return the paths of the matrices of a layer's feed-forward part."""
    return [path for stage in layer.stages[2:] for path in stage]
