"""Backbones with random weights, for measurements of speed and memory, which depend only on the shape."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from mode.config.backbone import RandomWeights
from mode.core.digests import describe_files, make_folder
from mode.core.errors import ConfigError, summarize_error
from mode.core.files import expand_home, reporting_full_disk


def ensure_random_model(weights: RandomWeights) -> Path:
    """Return the folder of a model with random weights. The first use draws and writes the weights, atomically.

    Raises:
        ConfigError: `transformers` has no causal LM for the configuration.
    """
    settings = json.dumps([weights.seed, weights.config], sort_keys=True)
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]
    folder = expand_home(weights.cache) / "backbones" / f"random-{key}"
    make_folder(folder, partial(write_random_model, weights), adopt_model)
    return folder


def write_random_model(weights: RandomWeights, folder: Path) -> dict[str, Any]:
    """Write a newly initialised model as fp32 safetensors.

    Raises:
        ConfigError: `transformers` has no causal LM for the configuration, or the disk is full.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from mode.core.tensors import count_bytes

    config = make_config(weights)
    try:
        torch.manual_seed(weights.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=None)
    except (KeyError, TypeError, ValueError) as error:
        reason = summarize_error(error)
        raise ConfigError(f"backbone.random.config: no causal LM for this configuration: {reason}") from error
    with reporting_full_disk(folder, count_bytes(model.parameters())):
        model.save_pretrained(folder)
    return {}


def adopt_model(folder: Path) -> dict[str, Any] | None:
    """Return the index of a model that an earlier version wrote without digests, if its files can be opened."""
    from safetensors import SafetensorError, safe_open

    names = [path.name for path in folder.glob("*") if path.is_file()]
    try:
        json.loads((folder / "config.json").read_text("utf-8"))
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, RecursionError, SafetensorError):
        return None
    return {"files": describe_files(folder, names)}


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
        reason = summarize_error(error)
        raise ConfigError(f"backbone.random.config: not a valid configuration: {reason}") from error
