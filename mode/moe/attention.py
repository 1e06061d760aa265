"""Attention layers as experts: in every decoder layer a router mixes what several of them say (BAM).

Shapes: N experts, B rows, S tokens per row, d hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mode.backbone.shape import ATTENTION
from mode.backbone.structure import find_layer_stack, resize_cache_slots
from mode.config.method import RouterSettings
from mode.gating.router import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARED = ("k_proj", "v_proj")
"""Maps into keys and values, where they are maps of their own."""


class AttentionBank(nn.Module):
    """sum_j g_j(x) A_j(x), with weights g of a router; all experts run, each on keys and values of its own.

    Attributes:
        experts: The attention layers.
        router: Their weights.
    """

    def __init__(self, experts: Sequence[nn.Module], router: Router) -> None:
        """Put experts side by side."""
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = router

    def forward(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        """Map (B, S, d) to (B, S, d), and what else the library's attention returns, of the first expert."""
        x: Tensor = args[0] if args else options["hidden_states"]
        weights = self.router(x)
        outputs = [expert(*args, **options) for expert in self.experts]
        parts = [weights[..., j, None].to(output[0].dtype) * output[0] for j, output in enumerate(outputs)]
        return (torch.stack(parts).sum(0), *outputs[0][1:])


def insert_attention_banks(
    model: PreTrainedModel,
    states: Sequence[Mapping[str, Tensor]],
    settings: RouterSettings,
    *,
    shares_keys: bool = False,
) -> list[AttentionBank]:
    """Put experts in the place of the attention of every decoder layer, each with its own slots of the cache.

    Args:
        model: A causal LM, changed in place.
        states: For every expert the weights of the whole model that it comes from, by name.
        settings: How the router chooses.
        shares_keys: Whether all experts of a layer have one map into keys and one into values, the model's own.

    Returns:
        The banks, in order.
    """
    trunk, name = find_layer_stack(model)
    layers: Any = getattr(trunk, name)
    prefix = next(path for path, module in model.named_modules() if module is layers)
    hidden, depth = model.config.get_text_config().hidden_size, len(layers)
    made = []
    for number, layer in enumerate(layers):
        part = next(part for name in ATTENTION if hasattr(layer, part := name.removesuffix(".")))
        own, experts = getattr(layer, part), []
        start = f"{prefix}.{number}.{part}."
        for index, state in enumerate(states):
            expert: Any = copy.deepcopy(own)
            expert.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})
            expert.layer_idx = number if index == 0 else depth * index + number
            for shared in SHARED if shares_keys else ():
                setattr(expert, shared, getattr(own, shared))
            experts.append(expert)
        bank = AttentionBank(experts, Router(hidden, len(states), settings))
        setattr(layer, part, bank)
        made.append(bank)
    model.config = trunk.config = resize_cache_slots(model.config, [*range(depth)] * len(states))
    return made
