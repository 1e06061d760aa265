"""An expert as an artefact that people keep: layers, stage-1 gates, and what it was made for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mode.checkpoint import load_tensors, save_tensors
from mode.files import write_atomic
from mode.modular import expert_state
from mode.settings import ConfigError

CARD = """# MoDE expert: {domain}

One domain expert for the backbone `{backbone}` (weights {backbone_fingerprint}): {expert_layers} transformer layers in
each of {num_blocks} blocks, with the gates of its stage-1 training. `mode compose {domain} ...` puts it beside others
on the same backbone.

Trained for {steps} steps on {tokens} tokens, seed {seed}. `expert.json` has the whole description.
"""


@dataclass(frozen=True)
class Expert:
    """A trained expert: its tensors and its description."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]


def save_expert(model: nn.Module, folder: Path, about: Mapping[str, Any]) -> None:
    """Write a modular model's first expert to a folder: expert.json, model.safetensors, README.md."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_tensors(folder / "model.safetensors", expert_state(model, 0), {"domain": about["domain"]})
    write_atomic(folder / "expert.json", json.dumps(about, indent=1, sort_keys=True).encode())
    write_atomic(folder / "README.md", CARD.format(**about).encode())


def load_expert(folder: Path) -> Expert:
    """Read an expert.

    Raises:
        ConfigError: A file is missing or damaged.
    """
    try:
        about = json.loads((folder / "expert.json").read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{folder}: no readable expert.json, so not an expert") from error
    tensors, _ = load_tensors(folder / "model.safetensors")
    return Expert(tensors=tensors, about=about)
