"""Attention layers as experts: in every decoder layer a router mixes the outputs of several (BAM).

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
"""Names of the layers that compute keys and values, in families where these are separate layers."""


class AttentionBank(nn.Module):
    """Mixture of attention layers, sum_j g_j(x) A_j(x), with weights g of a router. All experts run.

    Attributes:
        experts: The attention layers, each with its own slot in the key-value cache.
        router: Computes the weights of the experts.
    """

    def __init__(self, experts: Sequence[nn.Module], router: Router) -> None:
        """Store the experts and their router."""
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = router

    def forward(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        """Map (B, S, d) to (B, S, d). The other results of the library's attention are those of the first expert."""
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
    """Replace the attention of every decoder layer by a bank of experts with separate slots in the key-value cache.

    Args:
        model: A causal LM, changed in place.
        states: For every expert, the weights of the whole model that the expert comes from, by name.
        settings: Settings of the routers.
        shares_keys: Whether all experts of a layer share the model's own layers for keys and values.

    Returns:
        The banks, in the order of the layers.
    """
    trunk, name = find_layer_stack(model)
    layers: Any = getattr(trunk, name)
    prefix = next(path for path, module in model.named_modules() if module is layers)
    hidden, depth = model.config.get_text_config().hidden_size, len(layers)
    banks = []
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
        banks.append(bank)
    model.config = trunk.config = resize_cache_slots(model.config, [*range(depth)] * len(states))
    return banks
