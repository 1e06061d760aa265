"""LoRA (Hu et al., 2021) with PEFT: y = W0 x + (alpha / r) B A x, W0 frozen, B = 0 at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone import stack
from mode.method import Material, Method
from mode.settings import STRICT, ConfigError, Run

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@settings(frozen=True, kw_only=True, config=STRICT)
class LoRA(Method):
    """Low-rank adapters.

    Attributes:
        rank: r; the MoDE paper uses 16.
        alpha: Numerator of the scale alpha / r.
        target_modules: Linear layers that get an adapter: those of `attention`, as in the MoDE paper, or named ones.
        rank_stabilized: Scale by alpha / sqrt(r) instead (Kalajdzievski, 2023).
    """

    rank: Annotated[int, Field(gt=0)]
    alpha: Annotated[float, Field(gt=0.0)]
    target_modules: Literal["attention"] | Annotated[tuple[str, ...], Field(min_length=1)]
    rank_stabilized: bool = False

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with adapters injected; the adapters alone train.

        Raises:
            ConfigError: No layer has one of the target names, or the head is among them.
        """
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        model = material.backbone().requires_grad_(False)
        names = attention(model) if self.target_modules == "attention" else self.target_modules
        linears = {name.rpartition(".")[2]: module for name, module in model.named_modules() if is_linear(module)}
        linears.pop("lm_head", None)
        unknown = [name for name in names if name.rpartition(".")[2] not in linears]
        if unknown:
            known = ", ".join(sorted(linears))
            raise ConfigError(f"method.target_modules: {unknown[0]} is not one of the backbone's {known}")
        torch.manual_seed(run.seed)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=list(names),
            use_rslora=self.rank_stabilized,
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in linears.values()),
        )
        adapted: nn.Module = inject_adapter_in_model(config, model)
        return adapted

    def plain(self, model: Any) -> PreTrainedModel:
        """Return the backbone with the adapters added to its weights: W0 + (alpha / r) B A."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        for name, module in adapted:
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
        plain: PreTrainedModel = model
        return plain


def attention(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the linear layers of a decoder's attention, each with the name of the module that holds it."""
    trunk, name = stack(model)
    paths = [path for path, module in getattr(trunk, name)[0].named_modules() if is_linear(module)]
    return tuple(path for path in paths if "att" in path.partition(".")[0])


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer; GPT-2 has a class of its own."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)
