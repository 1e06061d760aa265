"""Insert MoDE blocks into a backbone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from mode.backbone.shape import divide_layers
from mode.backbone.structure import find_layer_stack, resize_cache_slots
from mode.config.method import GateSettings
from mode.core.errors import ConfigError
from mode.gating.gate import PLAIN, Gate
from mode.modular.block import Block, BlockSlot

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def insert_blocks(
    model: PreTrainedModel,
    *,
    num_experts: int,
    num_blocks: int,
    expert_layers: int,
    init: str = "copy",
    backbone_bias: float = 0.0,
    gate: GateSettings = PLAIN,
) -> nn.ModuleList:
    """Freeze a backbone and replace its layers by block slots.

    Args:
        model: A causal LM with L layers.
        num_experts: N, experts per block.
        num_blocks: B, which must divide L.
        expert_layers: l, layers per expert and block.
        init: `random`: as the backbone's family initialises its layers; `copy`: the first l layers of the block.
        backbone_bias: The gates' initial logit of the backbone; the experts' is 0.
        gate: How gates choose.

    Returns:
        The blocks, which now own the backbone's layers; the caller must keep a reference.

    Raises:
        ConfigError: B does not divide L, or `copy` asks for more layers than a block has.
    """
    trunk, name = find_layer_stack(model)
    layers = list(getattr(trunk, name))
    per_block = divide_layers(len(layers), num_blocks)
    if init == "copy" and expert_layers > per_block:
        raise ConfigError(f"method.expert_layers={expert_layers}: a block has only {per_block} layers to copy")
    model.requires_grad_(False)
    templates = plan_cache_slots(len(layers), num_blocks, num_experts, expert_layers, gate)
    blocks, slot = [], len(layers)
    for start in range(0, len(layers), per_block):
        experts = []
        for _ in range(num_experts):
            numbers = range(slot, slot + expert_layers)
            experts.append([copy_layer(model, layers[templates[number]], number, init) for number in numbers])
            slot += expert_layers
        made = Gate(model.config.hidden_size, num_experts, backbone_bias, gate)
        blocks.append(Block(layers[start : start + per_block], experts, made))
    if gate.scope == "prefix":
        for number, block in enumerate(blocks):
            block.gate.slot = slot + number
    model.config = trunk.config = resize_cache_slots(model.config, templates)
    setattr(trunk, name, nn.ModuleList(BlockSlot(block, place) for block in blocks for place in range(per_block)))
    return nn.ModuleList(blocks)


def plan_cache_slots(
    num_layers: int, num_blocks: int, num_experts: int, expert_layers: int, gate: GateSettings
) -> list[int]:
    """Return, for every slot of the key-value cache, the backbone layer with the same attention; -1 for full attention.

    The backbone's layers keep their slots. The experts' slots follow, block by block, and the slots of gates that see
    the whole prefix come last.

    >>> plan_cache_slots(4, 2, 1, 1, GateSettings(scope="prefix"))
    [0, 1, 2, 3, 0, 2, -1, -1]
    """
    per_block = divide_layers(num_layers, num_blocks)
    experts = [
        start + index % per_block
        for start in range(0, num_layers, per_block)
        for _ in range(num_experts)
        for index in range(expert_layers)
    ]
    gates = [-1] * num_blocks if gate.scope == "prefix" else []
    return [*range(num_layers), *experts, *gates]


def copy_layer(model: PreTrainedModel, template: nn.Module, slot: int, init: str) -> nn.Module:
    """Return a trainable copy of the decoder layer `template`, with its own cache slot."""
    layer: Any = copy.deepcopy(template)
    layer.requires_grad_(True)
    set_cache_slot(layer, slot)
    if init == "random":
        for module in layer.modules():
            model._init_weights(module)
    return layer  # type: ignore[no-any-return]


def set_cache_slot(layer: Any, slot: int) -> None:
    """Give a decoder layer a slot of the key-value cache."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = slot
