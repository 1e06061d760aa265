"""LoRA (Hu et al., 2021) with PEFT: y = W0 x + (alpha / r) B A x, W0 frozen, B = 0 at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import Layer, Shape, matches_name, read_shape
from mode.backbone.structure import find_layer_stack
from mode.config.base import STRICT
from mode.config.check import replace_settings
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.cost.adapters import adapter_cost
from mode.cost.flops import Cost, add_flops
from mode.methods.base import Material
from mode.methods.sizing import LowRank

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@settings(frozen=True, kw_only=True, config=STRICT)
class LoRA(LowRank):
    """Low-rank adapters.

    Attributes:
        target_modules: Linear layers that get an adapter: those of `attention`, as in the MoDE paper, or named ones.
        rank_stabilized: Scale by alpha / sqrt(r) instead (Kalajdzievski, 2023).
    """

    recorded_as: ClassVar[str] = "baselines.lora.LoRA"
    identical_at_start: ClassVar[bool] = True

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
        sized = self.sized(run)
        torch.manual_seed(run.seed)
        config = LoraConfig(
            r=sized.rank,
            lora_alpha=sized.alpha,  # type: ignore[arg-type]
            target_modules=list(names),
            use_rslora=self.rank_stabilized,
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in linears.values()),
        )
        adapted: nn.Module = inject_adapter_in_model(config, model)
        return adapted

    def at(self, rank: int) -> Self:
        """Return the method at another rank: with the same alpha / r, or as it is if that is to shrink."""
        if not self.rank_stabilized:
            return super().at(rank)
        changed: Self = replace_settings(self, rank=rank)
        return changed

    def size(self, shape: Shape) -> int:
        """Return the parameters of adapters of rank 1: inputs and outputs of every matrix that has one."""
        return sum(sum(layer.matrices[path]) for layer in shape.layers for path in self.targets(layer))

    def cost(self, run: Run) -> Cost:
        """Return what the adapters take beside a frozen backbone."""
        shape, rank, length = read_shape(run.backbone), self.sized(run).rank, run.train.sequence_length
        parts = [shape.head(trains=False)]
        for number, layer in enumerate(shape.layers):
            ranks = dict.fromkeys(self.targets(layer), rank)
            parts.append(adapter_cost(layer, length, ranks, upstream=number > 0))
        added = rank * self.size(shape)
        total = shape.parameters + added
        return Cost(flops=add_flops(parts), total=total, trainable=added, added=added, active=total)

    def targets(self, layer: Layer) -> list[str]:
        """Return the paths of a layer's matrices that get an adapter."""
        if self.target_modules == "attention":
            return [path for stage in layer.stages[:2] for path in stage]
        return [path for path in layer.matrices if any(matches_name(path, name) for name in self.target_modules)]

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
    trunk, name = find_layer_stack(model)
    paths = [path for path, module in getattr(trunk, name)[0].named_modules() if is_linear(module)]
    return tuple(path for path in paths if "att" in path.partition(".")[0])


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer; GPT-2 has a class of its own."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)
