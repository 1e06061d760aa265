"""Backbones with random weights in a stated shape: speed and memory depend on the shape alone."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from mode.config.backbone import RandomWeights
from mode.core.errors import ConfigError
from mode.core.files import make_folder


def ensure_random_model(weights: RandomWeights) -> Path:
    """Return the folder of a model with random weights, drawing them on first use; it appears whole or not at all.

    Raises:
        ConfigError: `transformers` knows no causal LM of that configuration.
    """
    asked = json.dumps([weights.seed, weights.config], sort_keys=True)
    key = hashlib.sha256(asked.encode()).hexdigest()[:16]
    folder = Path(weights.cache).expanduser() / "backbones" / f"random-{key}"
    make_folder(folder, "config.json", partial(write_random_model, weights))
    return folder


def write_random_model(weights: RandomWeights, folder: Path) -> None:
    """Write a freshly initialised model as safetensors in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    config = make_config(weights)
    try:
        torch.manual_seed(weights.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (KeyError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"backbone.random.config: no causal LM of this configuration: {reason}") from error
    model.save_pretrained(folder)


def make_config(weights: RandomWeights) -> Any:
    """Return the configuration that the weights are drawn for, without drawing them.

    Raises:
        ConfigError: `transformers` knows no such configuration.
    """
    from transformers import AutoConfig

    settings = dict(weights.config)
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (KeyError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"backbone.random.config: no such configuration: {reason}") from error
