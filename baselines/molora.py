"""MoLORA (Zadouri et al., 2023): low-rank experts on every linear layer, mixed per token by a dense router.

y = W0 x + (alpha / r) sum_i s_i B_i A_i x, with s = softmax(W x) over N experts, in fp32, without a bias. A is drawn
from a normal distribution and B = 0 at initialization. The outputs of the experts are mixed, not their factors. There
is no load-balancing loss if all experts run. The method was published for T5. This implementation is for decoders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import Layer, matches_name, read_shape
from mode.config.base import STRICT
from mode.config.method import RouterSettings
from mode.config.run import Run
from mode.cost.adapters import compute_bank_cost
from mode.cost.flops import Cost
from mode.methods.base import Material
from mode.methods.sizing import LowRank

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class MoLORA(LowRank):
    """Mixture of LoRA experts with a router at every layer.

    Attributes:
        num_experts: Number of experts, N.
        target_modules: Linear layers with experts, by the last parts of their paths; or `all`.
        router: Settings of the router; dense by default, as published.
    """

    recorded_as: ClassVar[str] = "baselines.molora.MoLORA"
    family: ClassVar[str] = "mixtures of low rank"
    source: ClassVar[str] = "Zadouri et al., 2023"
    weighs_experts: ClassVar[bool] = True
    identical_at_start: ClassVar[bool] = True

    num_experts: Annotated[int, Field(gt=0)]
    target_modules: Literal["all"] | Annotated[tuple[str, ...], Field(min_length=1)]
    router: RouterSettings = RouterSettings()

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with experts at its linear layers. Only experts and routers train.

        Raises:
            ConfigError: No layer has one of the target names.
        """
        import torch

        from mode.gating.router import Router
        from mode.moe.low_rank import LowRankBank, read_linear_size, replace_linears

        model: nn.Module = material.backbone()
        model.requires_grad_(False)
        torch.manual_seed(run.seed)
        rank = self.sized(run).rank

        def make(path: str, base: nn.Module) -> nn.Module:
            router = Router(read_linear_size(base)[0], self.num_experts, self.router)
            return LowRankBank(base, self.num_experts, rank, self.scale, router)

        replace_linears(model, self.target_modules, make)
        return model

    def cost(self, run: Run) -> Cost:
        """Return the cost with experts and routers on a frozen backbone."""
        shape, length = read_shape(run.backbone), run.train.sequence_length
        return compute_bank_cost(shape, length, self.num_experts, self.sized(run).rank, self.targets)

    def targets(self, layer: Layer) -> list[str]:
        """Return the paths of a layer's matrices with experts."""
        every, names = list(layer.matrices), self.target_modules
        return every if names == "all" else [path for path in every if any(matches_name(path, name) for name in names)]
