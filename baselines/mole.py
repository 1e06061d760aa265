"""MoLE, mixture of LoRA experts (Wu et al., 2024): one trained LoRA per domain, mixed by gates. Only the gates train.

At each adapted layer y = W0 x + sum_i G_i E_i, with E_i = (alpha / r) B_i A_i x and G = softmax(e [E_1 ... E_N] / tau).
The input of a gate is the concatenation of the normalized outputs of the experts. tau trains too. The balance loss is
- sum_i log q_i, where q_i is the mean weight of expert i over all layers and tokens.

The published gate reads the outputs of all tokens of a text, including later tokens. Here a gate reads only the output
at its own token, as a causal decoder requires. The paper has one gate per block or per layer. Here there is one gate
per layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import read_shape
from mode.config.base import STRICT
from mode.config.check import build_method, replace_settings
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.core.files import WEIGHTS
from mode.cost.adapters import compute_adapter_cost
from mode.cost.flops import Cost, add_flops
from mode.methods.base import Material
from mode.methods.sizing import ParameterMatched
from mode.methods.stages import stages_by_domain

if TYPE_CHECKING:
    from torch import Tensor, nn


@settings(frozen=True, kw_only=True, config=STRICT)
class MoLE(ParameterMatched):
    """Gates over trained LoRAs.

    Attributes:
        experts: Method of the experts, with the settings of its YAML file: LoRA.
        balance: Weight of the balance loss.
    """

    recorded_as: ClassVar[str] = "baselines.mole.MoLE"
    family: ClassVar[str] = "mixtures of low rank"
    source: ClassVar[str] = "Wu et al., 2024"
    weighs_experts: ClassVar[bool] = True

    experts: dict[str, Any]
    balance: Annotated[float, Field(ge=0.0)]

    def __post_init__(self) -> None:
        if not hasattr(self.expert, "targets"):
            raise ValueError("experts: not a low-rank method such as baselines.lora.LoRA")

    @property
    def expert(self) -> Any:
        """Method of the experts."""
        return build_method(self.experts, "method.experts")

    def at(self, rank: int) -> Self:
        """Return the method with experts of another rank."""
        expert = self.expert.at(rank)
        changed: Self = replace_settings(self, experts=self.experts | {"rank": expert.rank, "alpha": expert.alpha})
        return changed

    def needs(self, run: Run) -> tuple[Run, ...]:
        """Return one LoRA run per target."""
        return stages_by_domain(run, self.sized(run).expert, run.targets)

    def branches(self, run: Run) -> tuple[str, ...]:
        """Return the names of the experts: their domains."""
        return run.targets

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with the trained experts at its layers. Only the gates train.

        Raises:
            ConfigError: The weights of an earlier stage are not those of a LoRA.
        """
        import torch

        from mode.core.tensors import load_run_tensors
        from mode.moe.low_rank import BalanceLoss, OutputGatedBank, replace_linears

        model: nn.Module = material.backbone()
        model.requires_grad_(False)
        experts = [read_factors(load_run_tensors(folder / WEIGHTS, folder.name)) for folder in material.needs]
        balance_loss = BalanceLoss(self.balance)
        scale = self.sized(run).expert.scale

        def make(path: str, base: nn.Module) -> nn.Module:
            down, up = (torch.stack([expert[path][part] for expert in experts]) for part in (0, 1))
            return OutputGatedBank(base, down, up, scale, balance_loss)

        replace_linears(model, sorted({strip_layer(path) for path in experts[0]}), make)
        return model

    def cost(self, run: Run) -> Cost:
        """Return the cost with frozen experts and trained gates on a frozen backbone."""
        shape, length, count = read_shape(run.backbone), run.train.sequence_length, len(run.targets)
        expert = self.sized(run).expert
        parts, gates = [shape.head(trains=False)], 0
        for number, layer in enumerate(shape.layers):
            paths = expert.targets(layer)
            ranks = dict.fromkeys(paths, count * expert.rank)
            routers = {path: count * count * layer.matrices[path][1] for path in paths}
            parts.append(compute_adapter_cost(layer, length, ranks, upstream=number > 0, routers=routers, trains=False))
            gates += sum(routers.values()) + len(paths)
        added = gates + count * expert.rank * expert.size(shape)
        total = shape.parameters + added
        return Cost(flops=add_flops(parts), total=total, trainable=gates, added=added, active=total)


def read_factors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return both factors, A and B, of every adapter of a LoRA from PEFT, by the path of the layer in the model.

    Raises:
        ConfigError: The tensors have no adapter.
    """
    ends = (".lora_A.default.weight", ".lora_B.default.weight")
    paths = [name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])]
    if not paths:
        raise ConfigError("method.experts: the weights of these runs have no LoRA adapters")
    return {path: (tensors[path + ends[0]], tensors[path + ends[1]]) for path in paths}


def strip_layer(path: str) -> str:
    """Return a module's path without the path of its decoder layer.

    >>> strip_layer("model.layers.11.self_attn.q_proj")
    'self_attn.q_proj'
    """
    return re.split(r"\.\d+\.", path, maxsplit=1)[1]
