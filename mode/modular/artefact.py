"""An expert as an artefact that people keep: layers, stage-1 gates, and what it was made for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mode.config.method import GateSettings
from mode.core.errors import ConfigError
from mode.core.files import write_atomic
from mode.core.tensors import digest_tensors, load_tensors, save_tensors
from mode.modular.experts import SHARED_GATE, extract_expert_state

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
    tensors = extract_expert_state(model, 0)
    whole = {
        "schema": SCHEMA,
        **about,
        "weights": digest_tensors(tensors),
        "parameters": sum(value.numel() for value in tensors.values()),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_tensors(folder / TENSORS, tensors, {"domain": about["domain"]})
    write_atomic(folder / "README.md", CARD.format(**whole).encode())
    write_atomic(folder / ABOUT, json.dumps(whole, indent=1, sort_keys=True).encode())


def read_descriptions(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what a folder says of its experts, by domain, without their weights.

    An expert's own folder holds that one; a saved modular model's folder holds all of the model's, in order.

    Raises:
        ConfigError: It is neither, or does not say what it must.
    """
    if not (folder / ABOUT).exists() and (folder / "config.json").exists():
        return read_model_descriptions(folder)
    about = read_description(folder)
    return {str(about["domain"]): about}


def read_model_descriptions(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what a saved modular model says of its experts, by domain."""
    from mode.modular.model import MoDEConfig

    try:
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        if settings.get("model_type") != MoDEConfig.model_type:
            raise ConfigError(f"{folder}: a model without experts")
        config = MoDEConfig.from_dict(settings)
        gate = config.gates
        if gate.hidden:
            raise ConfigError(f"{folder}: {SHARED_GATE}")
    except (OSError, TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{folder / 'config.json'}: not a readable description of a modular model") from error
    source = {"backbone": config.backbone.get("name"), "backbone_fingerprint": config.backbone.get("fingerprint")}
    return {
        name: {"domain": name, **source, **describe_fit(config, gate), "number": number}
        for number, name in enumerate(config.experts)
    }


def describe_fit(shape: object, gate: GateSettings) -> dict[str, Any]:
    """Return what an expert fits besides its backbone: the shape of a modular model, and what its gates see.

    Args:
        shape: Says `num_blocks`, `expert_layers` and `head_rank`: the method, or a model's configuration.
        gate: Settings of the gates; those that are not named here may change afterwards.
    """
    return {name: getattr(shape, name) for name in ("num_blocks", "expert_layers", "head_rank")} | describe_gate_input(
        gate
    )


def describe_gate_input(gate: GateSettings) -> dict[str, Any]:
    """Return what an expert's gates were trained to see."""
    return {"gate_reads": gate.reads, "gate_scope": gate.scope, "gate_norm": gate.norm}


def read_description(folder: Path) -> dict[str, Any]:
    """Read what an expert in a folder of its own says of itself.

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


def load_experts(folder: Path) -> dict[str, Expert]:
    """Read a folder's experts, by domain.

    Raises:
        ConfigError: A file is missing or damaged, or the weights are not those that the folder describes.
    """
    abouts = read_descriptions(folder)
    if not (folder / ABOUT).exists():
        tensors = load_model_tensors(folder)
        return {name: extract_expert(folder, tensors, about) for name, about in abouts.items()}
    ((name, about),) = abouts.items()
    tensors, _ = load_tensors(folder / TENSORS)
    if digest_tensors(tensors) != about["weights"]:
        raise ConfigError(f"{folder / TENSORS}: its weights changed since {ABOUT} was written")
    return {name: Expert(tensors=tensors, about=about)}


def load_model_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a saved model's blocks, in fp32."""
    tensors: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(("blocks.", "head."))]  # noqa: SIM118
                tensors |= {name: file.get_tensor(name).float() for name in names}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file") from error
    return tensors


def extract_expert(folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Expert:
    """Pick one expert out of a saved model's tensors, named as `expert_state` names them."""
    state: dict[str, Tensor] = {}
    places = [f"blocks.{block}" for block in range(about["num_blocks"])] + ["head"] * bool(about["head_rank"])
    for block, place in enumerate(places):
        prefix = f"{place}.experts.{about['number']}."
        layers = {name: value for name, value in tensors.items() if name.startswith(prefix)}
        gate = {part: tensors.get(f"{place}.gate.{part}") for part in ("weight", "bias")}
        if not layers or any(value is None or len(value) <= about["number"] + 1 for value in gate.values()):
            raise ConfigError(f"{folder}: its weights are not those of the experts that config.json describes")
        state |= {f"{block}.layers.{name.removeprefix(prefix)}": value for name, value in layers.items()}
        rows = [0, about["number"] + 1]
        state |= {f"{block}.gate.{part}": value[rows] for part, value in gate.items() if value is not None}
    return Expert(tensors=state, about={**about, "weights": digest_tensors(state)})


def check_fits(about: Mapping[str, Any], wanted: Mapping[str, Any], where: object) -> None:
    """Refuse an expert that was made for another model.

    Args:
        about: What the expert says of itself.
        wanted: What it has to say: backbone, backbone_fingerprint, num_blocks, expert_layers, head_rank, and what its
            gates see.
        where: What to call the expert.

    Raises:
        ConfigError: Something differs; the message says what.
    """
    # Experts of earlier versions do not say what their gates see, and change no head.
    about = {"head_rank": 0, **describe_gate_input(GateSettings())} | dict(about)
    differing = [key for key in wanted if key != "backbone" and about[key] != wanted[key]]
    if not differing:
        return
    if "backbone_fingerprint" in differing:
        raise ConfigError(
            f"{where}: made for backbone {about['backbone']} with weights {about['backbone_fingerprint']}; "
            f"here it is {wanted['backbone']} with weights {wanted['backbone_fingerprint']}"
        )
    told = ", ".join(f"method.{key.replace('gate_', 'gate.')}={about[key]}" for key in differing)
    asked = ", ".join(f"{key.replace('gate_', 'gate.')}={wanted[key]}" for key in differing)
    raise ConfigError(f"{where}: made with {told}; here {asked}")
