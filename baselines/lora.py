"""LoRA (Hu et al., 2021) with PEFT: y = W0 x + (alpha / r) B A x, W0 frozen, B = 0 at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.method import Material, Method
from mode.settings import STRICT, ConfigError, Run

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class LoRA(Method):
    """Low-rank adapters.

    Attributes:
        rank: r; the MoDE paper uses 16.
        alpha: Numerator of the scale alpha / r.
        target_modules: Linear layers that get an adapter; the MoDE paper uses the attention matrices.
        rank_stabilized: Scale by alpha / sqrt(r) instead (Kalajdzievski, 2023).
    """

    rank: Annotated[int, Field(gt=0)]
    alpha: Annotated[float, Field(gt=0.0)]
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)]
    rank_stabilized: bool = False

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with adapters injected; the adapters alone train.

        Raises:
            ConfigError: No layer has one of the target names, or the head is among them.
        """
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        model = material.backbone().requires_grad_(False)
        linears = {name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)}
        unknown = [name for name in self.target_modules if name not in linears - {"lm_head"}]
        if unknown:
            known = ", ".join(sorted(linears - {"lm_head"}))
            raise ConfigError(f"method.target_modules: {unknown[0]} is not one of the backbone's {known}")
        torch.manual_seed(run.seed)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=list(self.target_modules),
            use_rslora=self.rank_stabilized,
        )
        adapted: nn.Module = inject_adapter_in_model(config, model)
        return adapted


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer."""
    from torch import nn

    return isinstance(module, nn.Linear)
