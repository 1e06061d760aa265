"""Feed-forward layers as experts: in every decoder layer a router sends each token to some of several of them.

Shapes: N experts, d hidden size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.backbone.structure import find_layer_stack
from mode.config.method import RouterSettings
from mode.core.errors import ConfigError
from mode.gating.router import Router

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
        if settings.active is None and settings.known:
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
    trunk, name = find_layer_stack(model)
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


GATED = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a gated feed-forward part."""


class LowRankFeedForward(nn.Module):
    """sum_i g_i E_i(x), each E_i the same frozen gated feed-forward part with its own low-rank change of all matrices.

    E_i(x) = (W_d + D_i)(act((W_g + G_i) x) * (W_u + U_i) x), where D, G and U are s B A. What the frozen matrices make
    of x is shared by all experts, and so is W_d, which is linear in the sum.

    Attributes:
        base: The frozen part.
        router: Weights g.
        scale: s.
        down, up: A, (N, r, inputs), and B, (N, outputs, r), of every matrix, by its name; B is zero at the start.
    """

    def __init__(self, base: Any, num_experts: int, rank: int, scale: float, router: Router) -> None:
        """Put experts beside a part that change nothing yet.

        Raises:
            ConfigError: The part is not gated, or its matrices go by other names.
        """
        super().__init__()
        if missing := [name for name in (*GATED, "act_fn") if not hasattr(base, name)]:
            raise ConfigError(f"{type(base).__name__}: no {missing[0]} in it: not a gated feed-forward part")
        self.base, self.router, self.scale = base, router, scale
        shapes = {name: getattr(base, name).weight.shape for name in GATED}
        self.down = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(num_experts, rank, inputs)) for name, (_, inputs) in shapes.items()}
        )
        self.up = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(num_experts, outputs, rank)) for name, (outputs, _) in shapes.items()}
        )
        for factor in self.down.values():
            nn.init.kaiming_uniform_(factor.flatten(0, 1), a=math.sqrt(5))  # as in LoRA

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, d) to (B, S, d)."""
        weights, flat = self.router(x).flatten(0, -2), x.flatten(0, -2)
        gate, up = self.base.gate_proj(flat), self.base.up_proj(flat)
        mixed, change = torch.zeros_like(up), torch.zeros_like(flat)
        for index in range(len(self.router.weight)):
            tokens = (weights[:, index] > 0).nonzero().squeeze(-1)
            own = flat[tokens]
            inner = self.base.act_fn(gate[tokens] + self.low_rank("gate_proj", index, own))
            inner = inner * (up[tokens] + self.low_rank("up_proj", index, own))
            inner = weights[tokens, index, None].to(inner.dtype) * inner
            mixed = mixed.index_add(0, tokens, inner.to(mixed.dtype))
            change = change.index_add(0, tokens, self.low_rank("down_proj", index, inner).to(change.dtype))
        out: Tensor = self.base.down_proj(mixed) + change
        return out.view(x.shape)

    def low_rank(self, name: str, index: int, x: Tensor) -> Tensor:
        """Return one expert's change of what a matrix makes of its input."""
        low = functional.linear(x, self.down[name][index])
        return self.scale * functional.linear(low, self.up[name][index])
