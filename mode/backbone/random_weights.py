"""Backbones with random weights, for measurements of speed and memory, which depend only on the shape."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from mode.config.backbone import RandomWeights
from mode.core.errors import ConfigError
from mode.core.files import expand_home, make_folder


def ensure_random_model(weights: RandomWeights) -> Path:
    """Return the folder of a model with random weights. The first use draws and writes the weights, atomically.

    Raises:
        ConfigError: `transformers` has no causal LM for the configuration.
    """
    settings = json.dumps([weights.seed, weights.config], sort_keys=True)
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]
    folder = expand_home(weights.cache) / "backbones" / f"random-{key}"
    make_folder(folder, "config.json", partial(write_random_model, weights))
    return folder


def write_random_model(weights: RandomWeights, folder: Path) -> None:
    """Write a newly initialised model as fp32 safetensors.

    Raises:
        ConfigError: `transformers` has no causal LM for the configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = make_config(weights)
    try:
        torch.manual_seed(weights.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (KeyError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"backbone.random.config: no causal LM for this configuration: {reason}") from error
    model.save_pretrained(folder)


def make_config(weights: RandomWeights) -> Any:
    """Return the `transformers` configuration of a model with random weights, without drawing the weights.

    Raises:
        ConfigError: `transformers` has no such configuration.
    """
    from transformers import AutoConfig

    settings = dict(weights.config)
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (KeyError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"backbone.random.config: not a valid configuration: {reason}") from error
