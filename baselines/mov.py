"""MoV (Zadouri et al., 2023): (IA)3 vectors as experts on keys, values and the feed-forward part, mixed per token.

h becomes h * sum_i s_i l_i, where h is a key, a value, or the input of the last matrix of the feed-forward part. l = 1
at initialization, and s = softmax(W h) over N experts, in fp32, without a bias. The method was published for T5. This
implementation is for decoders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import matches_name, read_shape
from mode.config.base import STRICT
from mode.config.check import replace_settings
from mode.config.method import RouterSettings
from mode.config.run import Run
from mode.cost.adapters import compute_adapter_cost
from mode.cost.flops import Cost, add_flops
from mode.methods.base import Material
from mode.methods.sizing import ParameterMatched

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class MoV(ParameterMatched):
    """Mixture of vectors.

    Attributes:
        num_experts: Number of experts, N.
        outputs: Linear layers whose output is scaled (keys and values), by the last parts of their paths.
        inputs: Linear layers whose input is scaled (the last of the feed-forward part), named likewise.
        router: Settings of the router; dense by default, as published.
    """

    recorded_as: ClassVar[str] = "baselines.mov.MoV"
    family: ClassVar[str] = "mixtures of low rank"
    source: ClassVar[str] = "Zadouri et al., 2023"
    weighs_experts: ClassVar[bool] = True
    identical_at_start: ClassVar[bool] = True

    num_experts: Annotated[int, Field(gt=0)]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    router: RouterSettings = RouterSettings()

    def __post_init__(self) -> None:
        if not self.outputs and not self.inputs:
            raise ValueError("outputs and inputs are both empty: nothing would train")

    def at(self, num_experts: int) -> Self:
        """Return the method with another number of vectors."""
        changed: Self = replace_settings(self, num_experts=num_experts)
        return changed

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with vectors at its layers. Only vectors and routers train.

        Raises:
            ConfigError: No layer has one of the names.
        """
        import torch

        from mode.gating.router import Router
        from mode.moe.low_rank import VectorBank, read_linear_size, replace_linears

        model: nn.Module = material.backbone()
        model.requires_grad_(False)
        torch.manual_seed(run.seed)
        count = self.sized(run).num_experts
        for names, before in ((self.outputs, False), (self.inputs, True)):

            def make(path: str, base: nn.Module, before: bool = before) -> nn.Module:
                router = Router(read_linear_size(base)[not before], count, self.router)
                return VectorBank(base, count, router, before=before)

            replace_linears(model, names, make)
        return model

    def cost(self, run: Run) -> Cost:
        """Return the cost with vectors and routers on a frozen backbone."""
        shape, length = read_shape(run.backbone), run.train.sequence_length
        count = self.sized(run).num_experts
        parts, added = [shape.head(trains=False)], 0
        for number, layer in enumerate(shape.layers):
            widths = {}
            for path, (inputs, outputs) in layer.matrices.items():
                for names, width in ((self.outputs, outputs), (self.inputs, inputs)):
                    if any(matches_name(path, name) for name in names):
                        widths[path] = 2 * width * count  # the router's matrix and the vectors, of equal size
            parts.append(
                compute_adapter_cost(layer, length, dict.fromkeys(widths, 0), upstream=number > 0, routers=widths)
            )
            added += sum(widths.values())
        total = shape.parameters + added
        return Cost(flops=add_flops(parts), total=total, trainable=added, added=added, active=total)
