"""An expert as an artefact: layers, stage-1 gates, and a description of its backbone, blocks and training."""

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
from mode.core.digests import DIGEST, digest_json
from mode.core.errors import ConfigError
from mode.core.escape import check_name, format_code
from mode.core.files import WEIGHTS, read_json, write_atomic
from mode.core.tensors import check_finite, digest_tensors, load_tensors, save_tensors
from mode.modular.experts import SHARED_GATE, extract_expert_state

SCHEMA = 1


ABOUT, TENSORS = "expert.json", "model.safetensors"


KEYS = ("schema", "domain", "backbone", "backbone_fingerprint", "num_blocks", "expert_layers", "weights")
"""Required keys of expert.json."""


CARD = """# MoDE expert: {domain}

One domain expert for the backbone {source} (weights {backbone_fingerprint}): {expert_layers} transformer layers in
each of {num_blocks} blocks, with the gates of its stage-1 training. `mode compose` accepts this folder in place of a
domain's name and composes the expert with others on the same backbone; `mode expert add` adds it to a composed model.

Trained for {steps} steps on {tokens} tokens, seed {seed}. `expert.json` has the whole description; the weights are
safetensors. The backbone is not included.
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
        folder: Folder to write; an existing one is replaced.
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
    write_atomic(folder / "README.md", CARD.format(**whole, source=format_code(str(whole["backbone"]))).encode())
    sealed = {**whole, DIGEST: digest_json(whole)}
    write_atomic(folder / ABOUT, json.dumps(sealed, indent=1, sort_keys=True).encode())


def read_descriptions(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the descriptions of a folder's experts, by domain, without their weights.

    The folder is an expert's own, or a saved modular model's, which has all experts of the model, in order.

    Raises:
        ConfigError: It is neither, or a required key is missing.
    """
    if not (folder / ABOUT).exists() and (folder / "config.json").exists():
        return read_model_descriptions(folder)
    about = read_description(folder)
    return {str(about["domain"]): about}


def read_model_descriptions(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the descriptions of a saved modular model's experts, by domain."""
    from mode.modular.model import MoDEConfig

    try:
        settings = read_json(folder / "config.json")
        if settings.get("model_type") != MoDEConfig.model_type:
            raise ConfigError("a model without experts")
        config = MoDEConfig.from_dict(settings)
        gate = config.gates
        if gate.hidden:
            raise ConfigError(SHARED_GATE)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error
    except (OSError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / 'config.json'}: not a readable description of a modular model") from error
    source = {"backbone": config.backbone.get("name"), "backbone_fingerprint": config.backbone.get("fingerprint")}
    return {
        name: {"domain": name, **source, **describe_fit(config, gate), "number": number}
        for number, name in enumerate(config.experts)
    }


def describe_fit(shape: object, gate: GateSettings) -> dict[str, Any]:
    """Return what a model must share with an expert besides the backbone: its shape, and the input of its gates.

    Args:
        shape: The method or a model's configuration, with `num_blocks`, `expert_layers` and `head_rank`.
        gate: Settings of the gates; those that are not returned may differ.
    """
    return {name: getattr(shape, name) for name in ("num_blocks", "expert_layers", "head_rank")} | describe_gate_input(
        gate
    )


def describe_gate_input(gate: GateSettings) -> dict[str, Any]:
    """Return the settings of the gates' input."""
    return {"gate_reads": gate.reads, "gate_scope": gate.scope, "gate_norm": gate.norm}


def read_description(folder: Path) -> dict[str, Any]:
    """Return the description of an expert in its own folder.

    Raises:
        ConfigError: There is no expert.json, a required key is missing, or its domain is not a name.
    """
    path = folder / ABOUT
    try:
        about = read_json(path)
    except ConfigError as error:
        raise ConfigError(f"{folder}: no readable {ABOUT}, so not an expert") from error
    if DIGEST in about and about.pop(DIGEST) != digest_json(about):  # earlier versions wrote no digest
        raise ConfigError(f"{path}: changed since it was written; train the expert again, or remove the key {DIGEST}")
    missing = [key for key in KEYS if key not in about]
    if missing:
        raise ConfigError(f"{path}: does not say its {missing[0]}, so not an expert that mode wrote")
    if about["schema"] != SCHEMA:
        raise ConfigError(f"{path}: schema {about['schema']}; this version reads {SCHEMA}")
    try:
        check_name(about["domain"])
    except ValueError as error:
        raise ConfigError(f"{path}: domain={about['domain']}: {error}") from error
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


def load_run_expert(folder: Path, run: str, domain: str) -> Expert:
    """Read the expert that a run has trained for a domain.

    Raises:
        ConfigError: A file is missing or damaged, or the expert is of another run or another domain.
    """
    check_owner(folder, run)
    experts = load_experts(folder)
    if domain not in experts:
        raise ConfigError(f"{folder}: an expert for {', '.join(experts)}, not for {domain}")
    return experts[domain]


def check_owner(folder: Path, run: str) -> None:
    """Check that the expert in a run's folder was trained by this run.

    Raises:
        ConfigError: Another run has trained it, or it is not readable.
    """
    about = read_description(folder)
    if about.get("run") != run:
        raise ConfigError(
            f"{folder}: the expert of run {about.get('run')} (seed {about.get('seed')}), not of run {run}; "
            f"remove {folder.parent / WEIGHTS}, and train run {run} again"
        )


def load_model_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a saved model's blocks."""
    tensors: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(("blocks.", "head."))]  # noqa: SIM118
                tensors |= {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file") from error
    return tensors


def extract_expert(folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Expert:
    """Return one expert of a saved model's tensors, in fp32 and named as by `extract_expert_state`."""
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
    check_finite(folder, state)
    state = {name: value.float() for name, value in state.items()}
    return Expert(tensors=state, about={**about, "weights": digest_tensors(state)})


def check_fits(about: Mapping[str, Any], wanted: Mapping[str, Any], where: object) -> None:
    """Check that an expert was trained for a model.

    Args:
        about: Description of the expert.
        wanted: Required values: backbone, backbone_fingerprint, num_blocks, expert_layers, head_rank, and the input of
            the gates.
        where: Name of the expert in messages.

    Raises:
        ConfigError: A value differs.
    """
    # Descriptions of earlier versions lack the input of the gates; their experts do not update the head.
    about = {"head_rank": 0, **describe_gate_input(GateSettings())} | dict(about)
    differing = [key for key in wanted if key != "backbone" and about[key] != wanted[key]]
    if not differing:
        return
    if "backbone_fingerprint" in differing:
        raise ConfigError(
            f"{where}: made for backbone {about['backbone']} with weights {about['backbone_fingerprint']}; "
            f"here it is {wanted['backbone']} with weights {wanted['backbone_fingerprint']}"
        )
    found = ", ".join(f"method.{key.replace('gate_', 'gate.')}={about[key]}" for key in differing)
    asked = ", ".join(f"{key.replace('gate_', 'gate.')}={wanted[key]}" for key in differing)
    raise ConfigError(f"{where}: made with {found}; here {asked}")
