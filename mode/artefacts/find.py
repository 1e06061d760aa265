"""Find a finished run by its id, or a saved model by its folder, and load it."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mode.backbone.load import load_model, locate
from mode.backbone.tokenizer import BackboneTokenizer, load_tokenizer
from mode.config.backbone import Backbone
from mode.config.check import from_yaml, replace_settings
from mode.config.run import Run
from mode.core.errors import ConfigError, suggest
from mode.core.files import SETTINGS
from mode.modular.artefact import ABOUT
from mode.runs.execute import restore
from mode.runs.prepare import prepare_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FoundModel:
    """A loaded model.

    Attributes:
        model: The model, on the CPU, in evaluation mode.
        tokenizer: Tokenizer of the model.
        place: Folder of the tokenizer's files.
        run: The run that trained the model; None for a saved model.
    """

    model: PreTrainedModel
    tokenizer: BackboneTokenizer
    place: Path
    run: Run | None


def find_run(name: str, runs: Path) -> Run:
    """Return the configuration of a run in a folder of runs.

    Args:
        name: Id of the run, or the start of the id.
        runs: Folder of runs.

    Raises:
        ConfigError: No run has that id, or several ids start with `name`.
    """
    known = {path.parent.name: path for path in sorted(runs.glob("*/" + SETTINGS))}
    found = [run_id for run_id in known if run_id.startswith(name)]
    if len(found) != 1:
        what = "no run of that id" if not found else f"the ids of {len(found)} runs start with {name}"
        raise ConfigError(f"{name}: {what} in {runs}{suggest(name, known)}")
    run: Run = from_yaml(known[found[0]].read_bytes(), known[found[0]])
    return replace_settings(run, paths=replace_settings(run.paths, runs=str(runs)))  # type: ignore[no-any-return]


def load_folder(folder: Path) -> PreTrainedModel:
    """Load a saved model from its folder: a modular model, or any supported decoder.

    Raises:
        ConfigError: The model is incomplete or not supported.
    """
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder / 'config.json'}: not readable as JSON settings") from error
    if kind != "mode":
        return load_model(Backbone(name=folder.name, path=str(folder))).eval()
    from safetensors import SafetensorError

    from mode.modular.model import MoDEConfig, MoDEForCausalLM

    try:
        config = MoDEConfig.from_pretrained(folder)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error
    try:
        model: PreTrainedModel = MoDEForCausalLM.from_pretrained(folder, config=config).eval()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{folder}: cannot load this model: {reason}") from error
    return model


def find_model(name: str, runs: Path) -> FoundModel:
    """Load the model of a run, or a saved model.

    Args:
        name: Id of the run or the start of the id, or folder of the model.
        runs: Folder of runs.

    Raises:
        ConfigError: No run or model has that name, or the weights are missing.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").exists():
        return FoundModel(
            load_folder(folder), load_tokenizer(Backbone(name=folder.name, path=str(folder))), folder, None
        )
    if folder.is_dir() and name not in {path.name for path in runs.glob("*")}:
        raise ConfigError(f"{name}: a folder without a config.json is not a model")
    run = find_run(name, runs)
    prepared = prepare_run(run)
    model = prepared.method.plain(restore(prepared))
    return FoundModel(model.eval(), load_tokenizer(run.backbone), locate(run.backbone), run)


def find_expert_folder(name: str, runs: Path, domains: Collection[str]) -> Path:
    """Return the folder that an expert, or several experts, are saved in.

    Args:
        name: Folder of an expert, of a saved model or of a run; or id of a run, or the start of the id.
        runs: Folder of runs.
        domains: Names of domains. The error message suggests the nearest.

    Raises:
        ConfigError: No expert has that name, or several run ids start with `name`.
    """
    here = Path(name).expanduser()
    places = [here, here / "expert", *sorted(path / "expert" for path in runs.glob("*") if path.name.startswith(name))]
    found = [place for place in places if (place / ABOUT).exists()]
    if not found and (here / "config.json").exists():
        return here
    if found and (len(found) == 1 or found[0] in places[:2]):
        return found[0]
    if found:
        raise ConfigError(f"{name}: the ids of {len(found)} runs start with {name}")
    raise ConfigError(
        f"{name}: neither a domain, nor a run in {runs}, nor a folder with an expert{suggest(name, domains)}"
    )


def list_branches(source: FoundModel) -> tuple[str, ...]:
    """Return the names of a modular model's branches, the backbone first; an empty tuple for other models."""
    experts = getattr(source.model.config, "experts", None)
    return ("backbone", *experts) if experts else ()
