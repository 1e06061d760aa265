"""LoRA (Hu et al., 2021) with PEFT: y = W0 x + (alpha / r) B A x, with W0 frozen and B = 0 at initialization."""

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
from mode.cost.adapters import compute_adapter_cost
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
        target_modules: Linear layers with an adapter: `attention`, as in the MoDE paper, or names of layers.
        rank_stabilized: Whether the scale is alpha / sqrt(r) instead of alpha / r (Kalajdzievski, 2023).
    """

    recorded_as: ClassVar[str] = "baselines.lora.LoRA"
    family: ClassVar[str] = "low rank"
    source: ClassVar[str] = "Hu et al., 2021"
    identical_at_start: ClassVar[bool] = True

    target_modules: Literal["attention"] | Annotated[tuple[str, ...], Field(min_length=1)]
    rank_stabilized: bool = False

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with adapters. Only the adapters train.

        Raises:
            ConfigError: A target name is the head, or not a linear layer of the backbone.
        """
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        model = material.backbone().requires_grad_(False)
        names = list_attention_layers(model) if self.target_modules == "attention" else self.target_modules
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
        """Return the method at another rank, with the same alpha / r; with `rank_stabilized`, alpha does not change."""
        if not self.rank_stabilized:
            return super().at(rank)
        changed: Self = replace_settings(self, rank=rank)
        return changed

    def size(self, shape: Shape) -> int:
        """Return the number of parameters of adapters of rank 1: inputs plus outputs of every adapted matrix."""
        return sum(sum(layer.matrices[path]) for layer in shape.layers for path in self.targets(layer))

    def cost(self, run: Run) -> Cost:
        """Return the cost with adapters on a frozen backbone."""
        shape, rank, length = read_shape(run.backbone), self.sized(run).rank, run.train.sequence_length
        parts = [shape.head(trains=False)]
        for number, layer in enumerate(shape.layers):
            ranks = dict.fromkeys(self.targets(layer), rank)
            parts.append(compute_adapter_cost(layer, length, ranks, upstream=number > 0))
        added = rank * self.size(shape)
        total = shape.parameters + added
        return Cost(flops=add_flops(parts), total=total, trainable=added, added=added, active=total)

    def targets(self, layer: Layer) -> list[str]:
        """Return the paths of a layer's matrices with an adapter."""
        if self.target_modules == "attention":
            return [path for stage in layer.stages[:2] for path in stage]
        return [path for path in layer.matrices if any(matches_name(path, name) for name in self.target_modules)]

    def plain(self, model: Any) -> PreTrainedModel:
        """Return the backbone with the adapters merged into its weights: W0 + (alpha / r) B A."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        for name, module in adapted:
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
        plain: PreTrainedModel = model
        return plain


def list_attention_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the paths of the linear layers of attention within a decoder layer."""
    trunk, name = find_layer_stack(model)
    paths = [path for path, module in getattr(trunk, name)[0].named_modules() if is_linear(module)]
    return tuple(path for path in paths if "att" in path.partition(".")[0])


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer; GPT-2 has its own class, Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)
