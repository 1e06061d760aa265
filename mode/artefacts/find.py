"""Find a finished run by its id, or a saved model by its folder, and load it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mode.backbone.load import load_model, locate, read_settings, reporting_load_errors
from mode.backbone.tokenizer import BackboneTokenizer, load_tokenizer
from mode.config.backbone import Backbone
from mode.config.check import from_yaml, replace_settings
from mode.config.run import Run
from mode.core.errors import ConfigError, suggest
from mode.core.files import SETTINGS, expand_home, find_paths
from mode.modular.artefact import ABOUT, check_owner
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
        ConfigError: No run has that id, several ids start with `name`, or the settings in the folder give another id:
            they, the data or the backbone have changed.
    """
    known = {path.parent.name: path for path in find_paths(runs, f"*/{SETTINGS}")}
    found = [run_id for run_id in known if run_id.startswith(name)]
    if not found and (runs / name).is_dir():
        raise ConfigError(f"{runs / name / SETTINGS}: no such file, so nothing says which run this is")
    if len(found) != 1:
        what = "no run of that id" if not found else f"the ids of {len(found)} runs start with {name}"
        raise ConfigError(f"{name}: {what} in {runs}{suggest(name, known)}")
    path = known[found[0]]
    run: Run = from_yaml(path.read_bytes(), path)
    run = replace_settings(run, paths=replace_settings(run.paths, runs=str(runs)))
    try:
        today = prepare_run(run).id
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if today != found[0]:
        raise ConfigError(f"{path}: with today's data and backbone, these are the settings of run {today}")
    return run


def load_folder(folder: Path) -> PreTrainedModel:
    """Load a saved model from its folder, in fp32: a modular model, or any supported decoder.

    Raises:
        ConfigError: The model is incomplete or not supported.
    """
    if read_settings(folder).get("model_type") != "mode":
        return load_model(Backbone(name=folder.name, path=str(folder))).eval()
    import torch

    from mode.modular.model import MoDEConfig, MoDEForCausalLM

    with reporting_load_errors(f"{folder}: cannot load this model"):
        try:
            config = MoDEConfig.from_pretrained(folder)
        except ConfigError as error:
            raise ConfigError(f"{folder / 'config.json'}: {error}") from error
        model: PreTrainedModel = MoDEForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    return model


def find_model(name: str, runs: Path) -> FoundModel:
    """Load the model of a run, or a saved model.

    Args:
        name: Id of the run or the start of the id, or folder of the model.
        runs: Folder of runs.

    Raises:
        ConfigError: No run or model has that name, or the weights are missing.
    """
    folder = expand_home(name)
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
        ConfigError: No expert has that name, several run ids start with `name`, or the expert in a run's folder is of
            another run.
    """
    here = expand_home(name)
    places = [here, here / "expert", *sorted(path / "expert" for path in runs.glob("*") if path.name.startswith(name))]
    found = [place for place in places if (place / ABOUT).exists()]
    if not found and (here / "config.json").exists():
        return here
    if found and (len(found) == 1 or found[0] in places[:2]):
        if found[0] not in places[:2]:
            check_owner(found[0], found[0].parent.name)
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
