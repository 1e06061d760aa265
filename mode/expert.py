"""An expert as an artefact that people keep: layers, stage-1 gates, and what it was made for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mode.checkpoint import digest, load_tensors, save_tensors
from mode.files import write_atomic
from mode.modular import expert_state
from mode.settings import ConfigError

SCHEMA = 1
ABOUT, TENSORS = "expert.json", "model.safetensors"
KEYS = ("schema", "domain", "backbone", "backbone_fingerprint", "num_blocks", "expert_layers", "weights")
"""What expert.json must say for an expert to be used."""

CARD = """# MoDE expert: {domain}

One domain expert for the backbone `{backbone}` (weights {backbone_fingerprint}): {expert_layers} transformer layers in
each of {num_blocks} blocks, with the gates of its stage-1 training. `mode compose` takes this folder in the place of a
domain's name and puts the expert beside others on the same backbone; `mode expert add` puts it into a composed model.

Trained for {steps} steps on {tokens} tokens, seed {seed}. `expert.json` has the whole description; the weights are
safetensors. The backbone is not in here.
"""


@dataclass(frozen=True)
class Expert:
    """A trained expert: its tensors and its description."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]


def save_expert(model: nn.Module, folder: Path, about: Mapping[str, Any]) -> None:
    """Write a modular model's first expert to a folder: expert.json, model.safetensors, README.md.

    Args:
        model: A modular model with one expert.
        folder: Folder to write; one that is there is replaced.
        about: Domain, backbone, shape and training of the expert.
    """
    tensors = expert_state(model, 0)
    whole = {
        "schema": SCHEMA,
        **about,
        "weights": digest(tensors),
        "parameters": sum(value.numel() for value in tensors.values()),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_tensors(folder / TENSORS, tensors, {"domain": about["domain"]})
    write_atomic(folder / "README.md", CARD.format(**whole).encode())
    write_atomic(folder / ABOUT, json.dumps(whole, indent=1, sort_keys=True).encode())


def describe(folder: Path) -> dict[str, Any]:
    """Read what an expert says of itself, without its weights.

    Raises:
        ConfigError: There is no expert.json, or it does not say what it must.
    """
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: no readable {ABOUT}, so not an expert") from error
    missing = [key for key in KEYS if not isinstance(about, dict) or key not in about]
    if missing:
        raise ConfigError(f"{path}: does not say its {missing[0]}, so not an expert that mode wrote")
    if about["schema"] != SCHEMA:
        raise ConfigError(f"{path}: schema {about['schema']}; this version reads {SCHEMA}")
    return dict(about)


def load_expert(folder: Path) -> Expert:
    """Read an expert.

    Raises:
        ConfigError: A file is missing or damaged, or the weights are not those that expert.json describes.
    """
    about = describe(folder)
    tensors, _ = load_tensors(folder / TENSORS)
    if digest(tensors) != about["weights"]:
        raise ConfigError(f"{folder / TENSORS}: its weights changed since {ABOUT} was written")
    return Expert(tensors=tensors, about=about)


def check_fits(about: Mapping[str, Any], wanted: Mapping[str, Any], where: object) -> None:
    """Refuse an expert that was made for another model.

    Args:
        about: What the expert says of itself.
        wanted: What it has to say: backbone, backbone_fingerprint, num_blocks, expert_layers.
        where: What to call the expert.

    Raises:
        ConfigError: Something differs; the message says what.
    """
    differing = [key for key in wanted if key != "backbone" and about[key] != wanted[key]]
    if not differing:
        return
    if "backbone_fingerprint" in differing:
        raise ConfigError(
            f"{where}: made for backbone {about['backbone']} with weights {about['backbone_fingerprint']}; "
            f"here it is {wanted['backbone']} with weights {wanted['backbone_fingerprint']}"
        )
    told = ", ".join(f"method.{key}={about[key]}" for key in differing)
    asked = ", ".join(f"{key}={wanted[key]}" for key in differing)
    raise ConfigError(f"{where}: made with {told}; here {asked}")
