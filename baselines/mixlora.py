"""MixLoRA (Li et al., 2024): low-rank experts on a frozen feed-forward part, and LoRA on attention.

Each expert is the whole gated feed-forward part with its own low-rank change of all three matrices. A token goes to the
two experts with the highest router logits, with renormalized weights. Attention has plain LoRA adapters. The balance
loss is that of the Switch Transformer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.backbone.structure import find_layer_stack
from mode.config.base import STRICT
from mode.config.method import RouterSettings
from mode.config.run import Run
from mode.cost.adapters import compute_adapter_cost
from mode.cost.flops import Cost, add_flops
from mode.methods.base import Material
from mode.methods.sizing import LowRank

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class MixLoRA(LowRank):
    """Low-rank experts of the feed-forward part.

    Attributes:
        num_experts: Number of experts, N.
        router: Settings of the router.
    """

    recorded_as: ClassVar[str] = "baselines.mixlora.MixLoRA"
    family: ClassVar[str] = "mixtures of low rank"
    source: ClassVar[str] = "Li et al., 2024"
    weighs_experts: ClassVar[bool] = True
    identical_at_start: ClassVar[bool] = True
    groups_tokens: ClassVar[bool] = True

    num_experts: Annotated[int, Field(gt=0)]
    router: RouterSettings

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with experts and adapters. Only experts, routers and adapters train.

        Raises:
            ConfigError: The backbone's feed-forward part is not gated.
        """
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        from mode.gating.router import Router
        from mode.moe.feed_forward import PART, LowRankFeedForward

        sized = self.sized(run)
        model: Any = material.backbone().requires_grad_(False)
        torch.manual_seed(run.seed)
        trunk, name = find_layer_stack(model)
        for layer in getattr(trunk, name):
            router = Router(model.config.get_text_config().hidden_size, self.num_experts, self.router)
            base = getattr(layer, PART)
            setattr(layer, PART, LowRankFeedForward(base, self.num_experts, sized.rank, self.scale, router))
        shape = read_shape(run.backbone)
        names = [path for stage in shape.layers[0].stages[:2] for path in stage]
        config = LoraConfig(r=sized.rank, lora_alpha=sized.alpha, target_modules=names)  # type: ignore[arg-type]
        frozen = {key for key, value in model.named_parameters() if not value.requires_grad}
        mixed: nn.Module = inject_adapter_in_model(config, model)
        for key, value in mixed.named_parameters():
            # PEFT freezes all other parameters, including those of the experts.
            value.requires_grad_(key.replace(".base_layer.", ".") not in frozen)
        return mixed

    def cost(self, run: Run) -> Cost | None:
        """Return the cost with experts and adapters on a frozen backbone; None with `router.top_p`."""
        if not self.router.known:
            return None
        shape, length, rank = read_shape(run.backbone), run.train.sequence_length, self.sized(run).rank
        active = min(self.router.active or self.num_experts, self.num_experts)
        parts, added, idle = [shape.head(trains=False)], 0, 0
        for number, layer in enumerate(shape.layers):
            attention = [path for stage in layer.stages[:2] for path in stage]
            experts = [path for stage in layer.stages[2:] for path in stage]
            ranks = dict.fromkeys(attention, rank) | dict.fromkeys(experts, active * rank)
            routed = {experts[0]: shape.hidden * self.num_experts}
            parts.append(compute_adapter_cost(layer, length, ranks, upstream=number > 0, routers=routed))
            one = rank * sum(sum(layer.matrices[path]) for path in experts)
            added += rank * sum(sum(layer.matrices[path]) for path in attention)
            added += self.num_experts * one + sum(routed.values())
            idle += (self.num_experts - active) * one
        total = shape.parameters + added
        return Cost(flops=add_flops(parts), total=total, trainable=added, added=added, active=total - idle)
