"""Feed-forward layers as experts: in every decoder layer a router assigns each token to some of several experts.

Shapes: B rows, S tokens per row, N experts, d hidden size.
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
"""Name of the feed-forward part of a decoder layer, in every supported family."""


class FeedForwardBank(nn.Module):
    """Mixture of feed-forward layers, sum_i g_i(x) FF_i(x), with weights g of a router.

    An expert runs only on the tokens that chose it.

    Attributes:
        experts: The feed-forward layers.
        router: Computes the weights of the experts.
    """

    def __init__(self, experts: Sequence[nn.Module], router: Router) -> None:
        """Store the experts and their router."""
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
            # An expert that no token chose still runs, on zero tokens, so that all trainable weights have a gradient.
            tokens = (weights[:, index] > 0).nonzero().squeeze(-1)
            part = weights[tokens, index, None].to(x.dtype) * expert(flat[tokens])
            out = out.index_add(0, tokens, part.to(out.dtype))
        return out.view(x.shape)


def insert_feed_forward_banks(
    model: PreTrainedModel, states: Sequence[Mapping[str, Tensor] | None], settings: RouterSettings
) -> list[FeedForwardBank]:
    """Replace the feed-forward part of every decoder layer by a bank of experts.

    Args:
        model: A causal LM, changed in place.
        states: For every expert, the weights of the whole model that the expert comes from, by name; None for a copy
            of the model's own layer.
        settings: Settings of the routers.

    Returns:
        The banks, in the order of the layers.

    Raises:
        ConfigError: A decoder layer has no part named `mlp`.
    """
    trunk, name = find_layer_stack(model)
    layers: Any = getattr(trunk, name)
    prefix = next(path for path, module in model.named_modules() if module is layers)
    hidden = model.config.get_text_config().hidden_size
    banks = []
    for number, layer in enumerate(layers):
        own = getattr(layer, PART, None)
        if own is None:
            raise ConfigError(f"{type(layer).__name__}: no part named {PART} to make experts of")
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
        banks.append(bank)
    return banks


GATED = ("gate_proj", "up_proj", "down_proj")
"""Names of the matrices of a gated feed-forward part."""


class LowRankFeedForward(nn.Module):
    """Mixture sum_i g_i E_i(x), where each E_i is one frozen gated feed-forward part with a low-rank change per matrix.

    E_i(x) = (W_d + D_i)(act((W_g + G_i) x) * (W_u + U_i) x), where D, G and U are s B A. All experts share the products
    of x with the frozen W_g and W_u. The product with W_d is linear, so it is computed once, for the sum over experts.

    Attributes:
        base: The frozen feed-forward part.
        router: Computes the weights g.
        scale: s.
        down: A of every matrix, (N, r, inputs), by name.
        up: B of every matrix, (N, outputs, r), by name; zero at the start.
    """

    def __init__(self, base: Any, num_experts: int, rank: int, scale: float, router: Router) -> None:
        """Add experts to a feed-forward part. The initial experts do not change its output.

        Args:
            base: The feed-forward part.
            num_experts: N.
            rank: r.
            scale: s.
            router: Router over the experts.

        Raises:
            ConfigError: The part has no gate, or its matrices have other names.
        """
        super().__init__()
        if missing := [name for name in (*GATED, "act_fn") if not hasattr(base, name)]:
            raise ConfigError(f"{type(base).__name__}: not a gated feed-forward part, it has no {missing[0]}")
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
            inner = self.base.act_fn(gate[tokens] + self.apply_change("gate_proj", index, own))
            inner = inner * (up[tokens] + self.apply_change("up_proj", index, own))
            inner = weights[tokens, index, None].to(inner.dtype) * inner
            mixed = mixed.index_add(0, tokens, inner.to(mixed.dtype))
            change = change.index_add(0, tokens, self.apply_change("down_proj", index, inner).to(change.dtype))
        out: Tensor = self.base.down_proj(mixed) + change
        return out.view(x.shape)

    def apply_change(self, name: str, index: int, x: Tensor) -> Tensor:
        """Apply one expert's low-rank change of a matrix, s B A, to the matrix's input."""
        low = functional.linear(x, self.down[name][index])
        return self.scale * functional.linear(low, self.up[name][index])
