"""Feed-forward layers as experts: in every decoder layer a router sends each token to some of several of them.

Shapes: N experts, d hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mode.backbone import stack
from mode.checked import ConfigError
from mode.router import Router
from mode.settings import RouterSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PART = "mlp"
"""What every supported family calls the feed-forward part of a decoder layer."""


class FeedForwardBank(nn.Module):
    """sum_i g_i(x) FF_i(x), with weights g of a router; an expert runs on the tokens that chose it alone.

    Attributes:
        experts: The feed-forward layers.
        router: Their weights.
    """

    def __init__(self, experts: Sequence[nn.Module], router: Router) -> None:
        """Put experts side by side."""
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, d) to (B, S, d)."""
        weights, flat = self.router(x).flatten(0, -2), x.flatten(0, -2)
        settings = self.router.settings
        if settings.top_k is None and settings.top_p is None:
            parts = [weights[:, i, None].to(x.dtype) * expert(flat) for i, expert in enumerate(self.experts)]
            mixed: Tensor = torch.stack(parts).sum(0)
            return mixed.view(x.shape)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            # An expert that no token chose still runs, on nothing, so that all that trains has a gradient.
            tokens = (weights[:, index] > 0).nonzero().squeeze(-1)
            part = weights[tokens, index, None].to(x.dtype) * expert(flat[tokens])
            out = out.index_add(0, tokens, part.to(out.dtype))
        return out.view(x.shape)


def insert_feed_forward_banks(
    model: PreTrainedModel, states: Sequence[Mapping[str, Tensor] | None], settings: RouterSettings
) -> list[FeedForwardBank]:
    """Put experts in the place of the feed-forward part of every decoder layer.

    Args:
        model: A causal LM, changed in place.
        states: For every expert the weights of the whole model that it comes from, by name; None: the model's own.
        settings: How the router chooses.

    Returns:
        The banks, in order.

    Raises:
        ConfigError: A decoder layer has no part of that name.
    """
    trunk, name = stack(model)
    layers: Any = getattr(trunk, name)
    prefix = next(path for path, module in model.named_modules() if module is layers)
    hidden = model.config.get_text_config().hidden_size
    made = []
    for number, layer in enumerate(layers):
        own = getattr(layer, PART, None)
        if own is None:
            raise ConfigError(f"{type(layer).__name__}: no part {PART} in it, so nothing to make experts of")
        experts = []
        for state in states:
            expert = copy.deepcopy(own)
            if state is not None:
                start = f"{prefix}.{number}.{PART}."
                part = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
                expert.load_state_dict(part)
            experts.append(expert)
        bank = FeedForwardBank(experts, Router(hidden, len(states), settings))
        setattr(layer, PART, bank)
        made.append(bank)
    return made
