"""Where a model's decoder layers are, and what of them is frozen."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mode.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def find_layer_stack(model: PreTrainedModel) -> tuple[Any, str]:
    """Return the module that holds a decoder's layers, and the name it holds them by.

    Raises:
        ConfigError: There is no list of as many layers as the configuration says, or more than one.
    """
    from torch import nn

    trunk: Any = model.base_model
    count = model.config.num_hidden_layers
    names = [name for name, child in trunk.named_children() if isinstance(child, nn.ModuleList) and len(child) == count]
    if len(names) != 1:
        raise ConfigError(f"{type(model).__name__}: {len(names)} lists of {count} layers in it, where one is expected")
    return trunk, names[0]


def find_decoder_layers(model: nn.Module) -> list[Any]:
    """Return a model's decoder layers, those of experts among them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def find_frozen_matrices(layers: list[Any]) -> list[Tensor]:
    """Return the weights of the linear maps in decoder layers that are not trained, each once."""
    from torch import nn

    maps = (module for layer in layers for module in layer.modules() if type(module) is nn.Linear)
    return list(dict.fromkeys(each.weight for each in maps if not each.weight.requires_grad))


def resize_cache_slots(config: Any, templates: Sequence[int]) -> Any:
    """Return a copy of a decoder's configuration whose key-value cache has the slots of `slots`."""
    config = copy.deepcopy(config)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(templates)
    if kinds is not None:
        config.layer_types = ["full_attention" if index < 0 else kinds[index] for index in templates]
    return config
