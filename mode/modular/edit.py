"""Replace and swap the experts of a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mode.core.errors import ConfigError, suggest
from mode.modular.block import find_blocks
from mode.modular.experts import check_separable, compose_experts, put_expert
from mode.modular.head import remove_head
from mode.modular.model import MoDEForCausalLM, make_modular


def extract_backbone(model: MoDEForCausalLM) -> PreTrainedModel:
    """Extract the backbone from a modular model, which must not be used afterwards."""
    trunk: Any = model.base_model
    blocks: Any = model.blocks
    layers = nn.ModuleList(layer for block in blocks for layer in block.backbone)
    name = next(name for name, child in trunk.named_children() if isinstance(child, nn.ModuleList))
    setattr(trunk, name, layers)
    backbone: PreTrainedModel = model.backbone
    remove_head(backbone)
    backbone.config = trunk.config = model.config.decoder
    backbone.generation_config = model.generation_config
    return backbone


def replace_experts(model: MoDEForCausalLM, experts: Mapping[str, Mapping[str, Tensor]]) -> MoDEForCausalLM:
    """Return a modular model on the same backbone with other experts, without training; consumes the given model.

    Every gate keeps each expert's odds against the backbone, so adding or removing an expert does not change the odds
    of the others. With one expert, the model equals that expert's stage-1 model.

    Args:
        model: A modular model.
        experts: Tensors of every expert (`extract_expert_state`) by name, in order.

    Raises:
        ConfigError: An expert's tensors are not those of this model's blocks.
    """
    config = model.config
    kept = {name: dict(state) for name, state in experts.items()}
    training = model.training
    made = make_modular(
        extract_backbone(model),
        experts=list(kept),
        num_blocks=config.num_blocks,
        expert_layers=config.expert_layers,
        gate=config.gates,
        head_rank=config.head_rank,
        source=config.backbone,
        init="random",
    )
    compose_experts(made, list(kept.values()), "odds")
    made.config.embedded = config.embedded
    made.train(training)
    return made


def swap_expert(model: MoDEForCausalLM, leaves: str, comes: str, tensors: Mapping[str, Tensor]) -> None:
    """Replace one expert of a model in use by another; nothing else of the model changes.

    Args:
        model: A modular model.
        leaves: Name of the expert to remove.
        comes: Name of the expert to insert.
        tensors: Its tensors (`extract_expert_state`).

    Raises:
        ConfigError: There is no such expert to remove, the new name is taken, or the tensors do not fit the model's
            blocks. The model is then unchanged.
    """
    names = model.config.experts
    if leaves not in names:
        raise ConfigError(f"{leaves}: not one of the experts {', '.join(names)}{suggest(leaves, names)}")
    if comes != leaves and comes in names:
        raise ConfigError(f"{comes}: the model has an expert of that name already")
    index = names.index(leaves)
    check_shapes(model, index, tensors)
    put_expert(model, index, tensors)
    names[index] = comes


def check_shapes(model: MoDEForCausalLM, index: int, tensors: Mapping[str, Tensor]) -> None:
    """Check names and shapes of an expert's tensors, before any is copied.

    Raises:
        ConfigError: A tensor is missing, unexpected or of another shape.
    """
    check_separable(model)
    expected: dict[str, Any] = {}
    for number, block in enumerate(find_blocks(model)):
        layers = block.experts[index].state_dict()
        expected |= {f"{number}.layers.{name}": value.shape for name, value in layers.items()}
        width = block.gate.weight.shape[1]
        expected |= {f"{number}.gate.weight": torch.Size((2, width)), f"{number}.gate.bias": torch.Size((2,))}
    found = {name: value.shape for name, value in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            shown = [tuple(shapes[name]) if name in shapes else "nothing" for shapes in (found, expected)]
            raise ConfigError(
                f"not an expert for this model's blocks: {name} is {shown[0]}, where {shown[1]} is expected"
            )
