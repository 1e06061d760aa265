"""Experts of the head: low-rank updates of a frozen output head, mixed per token as a block's branches are.

With a gate a = softmax(Linear(h)) over the backbone's head W and N experts, the logits of a final hidden state h are

    W h + sum_j a_j s U_j V_j h

Every branch is the head with its own low-rank update, and the backbone's branch has none. Nothing of the size of W is
trained or copied: U_j has r columns and V_j r rows. U_j is initialised to zero, so a fresh expert changes nothing.

Shapes: B rows, S tokens per row, d hidden size, V vocabulary size, r rank, N experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.config.method import GateSettings
from mode.core.errors import ConfigError
from mode.gating.gate import Gate
from mode.modular.execution import Execution

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALE = 2.0
"""s: as in LoRA with an alpha of twice the rank."""


class HeadExpert(nn.Module):
    """A low-rank update of the head, U V."""

    def __init__(self, hidden: int, vocabulary: int, rank: int) -> None:
        """Initialise U to zero."""
        super().__init__()
        self.down = nn.Linear(hidden, rank, bias=False)
        self.up = nn.Linear(rank, vocabulary, bias=False)
        nn.init.normal_(self.down.weight, std=hidden**-0.5)
        nn.init.zeros_(self.up.weight)


class HeadBlock(nn.Module):
    """The experts of a head and their gate.

    The loss computes logits chunk by chunk from hidden states and one weight. So `widen` appends every expert's gated
    values to the hidden states, and `wide` appends every expert's U to W: their product is the mixed logits.

    Attributes:
        experts: The experts.
        gate: Weights of the branches; reads the final hidden state.
        weights: Mean branch weights of the last forward pass, (N + 1,).
        execution: Of its fields `bypass_experts` alone has a meaning here: the head is then the backbone's.
    """

    def __init__(
        self, hidden: int, vocabulary: int, num_experts: int, rank: int, backbone_bias: float, gate: GateSettings
    ) -> None:
        """Initialise fresh experts and their gate."""
        super().__init__()
        self.experts = nn.ModuleList(HeadExpert(hidden, vocabulary, rank) for _ in range(num_experts))
        self.gate = Gate(hidden, num_experts, backbone_bias, gate)
        self.weights: Tensor | None = None
        self.execution = Execution()

    def widen(self, states: Tensor) -> Tensor:
        """Return final hidden states, (B, S, d), followed by every expert's gated values, (B, S, d + N r)."""
        if self.execution.bypass_experts:
            return states
        weights = self.gate(states)
        self.weights = weights.detach().mean(dim=tuple(range(weights.ndim - 1)))
        parts = [states]
        for index, expert in enumerate(self.each()):
            values = expert.down(states)
            parts.append((SCALE * weights[..., index + 1, None] * values).to(states.dtype))
        return torch.cat(parts, dim=-1)

    def wide(self, weight: Tensor) -> Tensor:
        """Return the head that goes with `widen`, (V, d + N r)."""
        if self.execution.bypass_experts:
            return weight
        return torch.cat([weight, *(expert.up.weight for expert in self.each())], dim=1)

    def each(self) -> list[HeadExpert]:
        """Return the experts, in order."""
        return [expert for expert in self.experts if isinstance(expert, HeadExpert)]


class ModularHead(nn.Linear):
    """The backbone's head with its own weight, and the experts of a `HeadBlock`."""

    def __init__(self, base: nn.Linear, block: HeadBlock) -> None:
        """Replace a head."""
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.block = (block,)  # in a tuple, so that the block is not registered as a submodule here

    def forward(self, states: Tensor) -> Tensor:
        """Map final hidden states, (B, S, d), to logits, (B, S, V)."""
        wide = self.widen(states)
        return functional.linear(wide, self.wide.to(wide.dtype))

    def widen(self, states: Tensor) -> Tensor:
        """Return what `HeadBlock.widen` makes of final hidden states."""
        return self.block[0].widen(states)

    @property
    def wide(self) -> Tensor:
        """The weight that goes with it, (V, d + N r)."""
        return self.block[0].wide(self.weight)


def insert_head(
    model: PreTrainedModel, *, num_experts: int, rank: int, backbone_bias: float, gate: GateSettings
) -> HeadBlock:
    """Add experts to a causal LM's head, in place.

    Returns:
        The experts and their gate, which the caller must keep.

    Raises:
        ConfigError: The head has a bias.
    """
    base: nn.Linear = model.get_output_embeddings()
    if base.bias is not None:
        raise ConfigError(
            "method.head_rank: the head of this backbone has a bias, which low-rank experts do not support"
        )
    block = HeadBlock(base.in_features, base.out_features, num_experts, rank, backbone_bias, gate)
    model.set_output_embeddings(ModularHead(base, block))
    return block


def remove_head(model: PreTrainedModel) -> None:
    """Give a causal LM its plain head back, if it has another."""
    head = model.get_output_embeddings()
    if isinstance(head, ModularHead):
        plain = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        plain.weight = head.weight
        model.set_output_embeddings(plain)
