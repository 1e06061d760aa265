"""An expert's tensors: extracted from a model, composed, and inserted into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mode.core.errors import ConfigError
from mode.modular.block import find_blocks

SHARED_GATE = "its gates have a hidden layer (gate.hidden), which all experts share: none can be added or removed"


def extract_expert_state(model: nn.Module, index: int) -> dict[str, Tensor]:
    """Return one expert's layers and its gates' rows for the backbone and for it, named `i.experts...` by block.

    Raises:
        ConfigError: The gates have a hidden layer.
    """
    check_separable(model)
    state: dict[str, Tensor] = {}
    for number, block in enumerate(find_blocks(model)):
        layers = block.experts[index]
        state |= {f"{number}.layers.{name}": value for name, value in layers.state_dict().items()}
        rows = [0, index + 1]
        state |= {f"{number}.gate.weight": block.gate.weight[rows], f"{number}.gate.bias": block.gate.bias[rows]}
    return {name: value.detach().clone() for name, value in state.items()}


@torch.no_grad()
def compose_experts(model: nn.Module, states: Sequence[Mapping[str, Tensor]], handover: str) -> None:
    """Insert trained experts into a modular model with as many experts.

    With `handover="odds"` the gates keep each expert's odds against the backbone as learned in stage 1: the backbone's
    logit becomes 0 and expert j's becomes (w_j - w_bb) x + (b_j - b_bb). Masking all experts but j then gives exactly
    the stage-1 model of j. With any other value the gates do not change.

    Args:
        model: A modular model with len(states) experts.
        states: Experts, as `extract_expert_state` returns them.
        handover: `odds`, `fresh` or `solved`.

    Raises:
        ConfigError: An expert's layers are not those of the model's blocks.
    """
    if handover == "odds":
        for block in find_blocks(model):
            block.gate.weight.zero_()
            block.gate.bias.zero_()
    for index, state in enumerate(states):
        put_expert(model, index, state, handover)


@torch.no_grad()
def put_expert(model: nn.Module, index: int, state: Mapping[str, Tensor], handover: str = "odds") -> None:
    """Replace one expert of a modular model by a trained one, in place; the other experts keep their odds.

    Args:
        model: A modular model.
        index: Index of the expert that is replaced.
        state: The new expert, as `extract_expert_state` returns it.
        handover: `odds`: its rows of the gates keep its odds against the backbone; `fresh`: the gates stay as they are.

    Raises:
        ConfigError: The expert's layers are not those of the model's blocks, or the gates have a hidden layer.
    """
    check_separable(model)
    for number, block in enumerate(find_blocks(model)):
        prefix = f"{number}.layers."
        layers = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        try:
            block.experts[index].load_state_dict(layers)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ConfigError(f"expert {index} does not fit block {number}: {reason}") from error
        if handover == "odds":
            for gate, rows in zip((block.gate.weight, block.gate.bias), extract_gate_rows(state, number), strict=True):
                gate[index + 1] = gate[0] + (rows[1] - rows[0])


def check_separable(model: nn.Module) -> None:
    """Check that a model's gates have separate rows for each expert.

    Raises:
        ConfigError: They have a hidden layer.
    """
    if any(block.gate.inner is not None for block in find_blocks(model)):
        raise ConfigError(SHARED_GATE)


def extract_gate_rows(state: Mapping[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """Return weight and bias of an expert's gate in one block: the backbone's row and the expert's."""
    return state[f"{number}.gate.weight"], state[f"{number}.gate.bias"]
