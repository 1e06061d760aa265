"""Modular Domain Experts: the paper's equations 1 and 2 on a Hugging Face decoder.

The backbone's L layers fall into B blocks. Block i holds its L/B backbone layers f_bb and N experts f_e^1 ... f_e^N,
each a stack of l ordinary transformer layers. All read the block's input x and their outputs are mixed per token:

    [a_bb, a_e^1 ... a_e^N] = softmax(Linear(x))              (equation 1)
    y = a_bb f_bb(x) + sum_j a_e^j f_e^j(x)                   (equation 2)

Embeddings, positional encoding, final norm and head are the backbone's, shared and frozen.

The model keeps its Hugging Face class: the stack of layers is replaced by the stack of blocks, each called as a layer
is. Masks, rotary embeddings, key-value cache and `generate()` are therefore the library's own, and every expert layer
has a cache slot of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mode.settings import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Gate(nn.Linear):
    """Per-token weights of a block's branches: the backbone first, then the experts (equation 1)."""

    def __init__(self, hidden_size: int, num_experts: int, backbone_bias: float) -> None:
        """Start with the same weights for every token: the softmax of `backbone_bias` and, for each expert, 0."""
        super().__init__(hidden_size, num_experts + 1)
        with torch.no_grad():
            self.weight.zero_()
            self.bias.zero_()
            self.bias[0] = backbone_bias

    def forward(self, states: Tensor) -> Tensor:
        """Map a block's input, (B, S, d), to branch weights that sum to one, (B, S, N + 1), in fp32."""
        with torch.autocast(states.device.type, enabled=False):
            logits = nn.functional.linear(states.float(), self.weight.float(), self.bias.float())
        return logits.softmax(-1)


class Block(nn.Module):
    """A block of backbone layers and the experts beside it; called as one layer is (equation 2).

    Attributes:
        backbone: The block's own layers, frozen.
        experts: One stack of layers per expert.
        gate: Weights of the branches.
        weights: Mean branch weights of the last forward pass, (N + 1,).
    """

    def __init__(self, backbone: Sequence[nn.Module], experts: Sequence[Sequence[nn.Module]], gate: Gate) -> None:
        """Put the branches side by side."""
        super().__init__()
        self.backbone = nn.ModuleList(backbone)
        self.experts = nn.ModuleList(nn.ModuleList(layers) for layers in experts)
        self.gate = gate
        self.weights: Tensor | None = None

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        """Map a block's input, (B, S, d), to its output, (B, S, d); options go to every layer."""
        weights = self.gate(hidden_states)
        self.weights = weights.detach().mean(dim=(0, 1))
        branches = [self.backbone, *self.experts]
        mixed: Tensor = torch.zeros((), device=hidden_states.device)
        for index, layers in enumerate(branches):
            output = run_layers(layers, hidden_states, options)
            mixed = mixed + weights[..., index : index + 1].to(output.dtype) * output
        return mixed


def run_layers(layers: Any, states: Tensor, options: dict[str, Any]) -> Tensor:
    """Run a stack of decoder layers, (B, S, d) to (B, S, d)."""
    for layer in layers:
        states = layer(states, **options)
    return states


def make_modular(
    model: PreTrainedModel,
    *,
    num_experts: int,
    num_blocks: int,
    expert_layers: int,
    init: str,
    backbone_bias: float,
) -> PreTrainedModel:
    """Freeze a backbone and put experts beside its blocks, in place.

    Args:
        model: A causal LM with L layers.
        num_experts: N, experts per block.
        num_blocks: B, which must divide L.
        expert_layers: l, layers per expert and block.
        init: `random`: the backbone's own initialisation; `copy`: the first l layers of the block.
        backbone_bias: The gates' initial logit of the backbone; the experts' is 0.

    Returns:
        The same model, its layers replaced by blocks, its backbone frozen.

    Raises:
        ConfigError: B does not divide L, or `copy` asks for more layers than a block has.
    """
    trunk: Any = model.base_model
    layers = list(trunk.layers)
    per_block, rest = divmod(len(layers), num_blocks)
    if rest:
        valid = [number for number in range(1, len(layers) + 1) if len(layers) % number == 0]
        raise ConfigError(f"method.num_blocks={num_blocks}: {len(layers)} layers divide into {valid} blocks")
    if init == "copy" and expert_layers > per_block:
        raise ConfigError(f"method.expert_layers={expert_layers}: a block has only {per_block} layers to copy")
    model.requires_grad_(False)
    # Layers keep their index into the key-value cache; experts get the slots after the backbone's.
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers) + num_blocks * num_experts * expert_layers
    model.config = trunk.config = config
    blocks, slot = [], len(layers)
    for start in range(0, len(layers), per_block):
        own = layers[start : start + per_block]
        experts = []
        for _ in range(num_experts):
            experts.append([new_layer(model, own[i % per_block], slot + i, init) for i in range(expert_layers)])
            slot += expert_layers
        blocks.append(Block(own, experts, Gate(config.hidden_size, num_experts, backbone_bias)))
    trunk.layers = nn.ModuleList(blocks)
    return model


def new_layer(model: PreTrainedModel, template: nn.Module, slot: int, init: str) -> nn.Module:
    """Make a trainable decoder layer like `template`, with its own cache slot."""
    layer: Any = copy.deepcopy(template)
    layer.requires_grad_(True)
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = slot
        if init == "random":
            reset(model, module)
    return layer  # type: ignore[no-any-return]


def reset(model: PreTrainedModel, module: nn.Module) -> None:
    """Draw a module's weights as the backbone's family initialises them: normal matrices, unit norms."""
    for name, parameter in module.named_parameters(recurse=False):
        with torch.no_grad():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, model.config.initializer_range)
            else:
                parameter.fill_(0.0 if name == "bias" else 1.0)


def gate_means(model: nn.Module) -> dict[str, float]:
    """Return the mean weight of every branch in the last forward pass, by block; branch 0 is the backbone."""
    return {
        f"gate/block{number}/branch{branch}": float(weight)
        for number, block in enumerate(blocks_of(model))
        if block.weights is not None
        for branch, weight in enumerate(block.weights)
    }


def blocks_of(model: nn.Module) -> list[Block]:
    """Return the blocks of a modular model, in order."""
    return [module for module in model.modules() if isinstance(module, Block)]


def expert_state(model: nn.Module, index: int) -> dict[str, Tensor]:
    """Return one expert's layers and its gates' rows for the backbone and for it, named `i.experts...` by block."""
    state: dict[str, Tensor] = {}
    for number, block in enumerate(blocks_of(model)):
        layers = block.experts[index]
        state |= {f"{number}.layers.{name}": value for name, value in layers.state_dict().items()}
        rows = [0, index + 1]
        state |= {f"{number}.gate.weight": block.gate.weight[rows], f"{number}.gate.bias": block.gate.bias[rows]}
    return {name: value.detach().clone() for name, value in state.items()}


@torch.no_grad()
def compose_experts(model: nn.Module, states: Sequence[dict[str, Tensor]], handover: str) -> None:
    """Put trained experts into a modular model with as many slots.

    With `handover="odds"` the gates keep each expert's odds against the backbone as learned in stage 1: the backbone's
    logit becomes 0 and expert j's becomes (w_j - w_bb) x + (b_j - b_bb). Masking all experts but j then gives exactly
    the stage-1 model of j. With `fresh` the gates stay as they are.

    Args:
        model: A modular model with len(states) experts.
        states: Experts, as `expert_state` returns them.
        handover: `odds` or `fresh`.
    """
    for number, block in enumerate(blocks_of(model)):
        if handover == "odds":
            block.gate.weight.zero_()
            block.gate.bias.zero_()
        for index, state in enumerate(states):
            prefix = f"{number}.layers."
            layers = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            block.experts[index].load_state_dict(layers)
            if handover == "odds":
                weight, bias = state[f"{number}.gate.weight"], state[f"{number}.gate.bias"]
                block.gate.weight[index + 1] = weight[1] - weight[0]
                block.gate.bias[index + 1] = bias[1] - bias[0]
