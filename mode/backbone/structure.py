"""Find a model's decoder layers and their frozen matrices, and size its key-value cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mode.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def find_layer_stack(model: PreTrainedModel) -> tuple[Any, str]:
    """Return the module that holds a decoder's list of layers, and the attribute name of the list.

    Raises:
        ConfigError: The module does not have exactly one list with the configured number of layers.
    """
    from torch import nn

    trunk: Any = model.base_model
    count = model.config.num_hidden_layers
    names = [name for name, child in trunk.named_children() if isinstance(child, nn.ModuleList) and len(child) == count]
    if len(names) != 1:
        raise ConfigError(f"{type(model).__name__}: expected one list of {count} layers, found {len(names)}")
    return trunk, names[0]


def find_decoder_layers(model: nn.Module) -> list[Any]:
    """Return all decoder layers of a model, including the layers of experts."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def find_frozen_matrices(layers: list[Any]) -> list[Tensor]:
    """Return the frozen weights of the linear layers in decoder layers; a shared weight appears once."""
    from torch import nn

    linears = (module for layer in layers for module in layer.modules() if type(module) is nn.Linear)
    return list(dict.fromkeys(linear.weight for linear in linears if not linear.weight.requires_grad))


def resize_cache_slots(config: Any, templates: Sequence[int]) -> Any:
    """Return a copy of a decoder's configuration whose key-value cache has one slot per template.

    Args:
        config: Configuration of the decoder.
        templates: For each slot, the index of the layer whose attention type the slot has; below 0 for full attention.
    """
    config = copy.deepcopy(config)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(templates)
    if kinds is not None:
        config.layer_types = ["full_attention" if index < 0 else kinds[index] for index in templates]
    return config
