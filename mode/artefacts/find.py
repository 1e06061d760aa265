"""Find a finished run, or a saved model, by what people call it, and load it."""

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
    """A model at hand.

    Attributes:
        model: The model, on the CPU, not training.
        tokenizer: Its tokenizer.
        place: Folder of the tokenizer's files.
        run: The run that made it; None for a folder.
    """

    model: PreTrainedModel
    tokenizer: BackboneTokenizer
    place: Path
    run: Run | None


def find_run(name: str, runs: Path) -> Run:
    """Return the configuration of a run in a folder of runs, by its id or the start of it.

    Raises:
        ConfigError: There is no such run, or more than one.
    """
    known = {path.parent.name: path for path in sorted(runs.glob("*/" + SETTINGS))}
    found = [run_id for run_id in known if run_id.startswith(name)]
    if len(found) != 1:
        what = "no run of that id" if not found else f"{len(found)} runs begin with it"
        raise ConfigError(f"{name}: {what} in {runs}{suggest(name, known)}")
    run: Run = from_yaml(known[found[0]].read_text("utf-8"))
    return replace_settings(run, paths=replace_settings(run.paths, runs=str(runs)))  # type: ignore[no-any-return]


def load_folder(folder: Path) -> PreTrainedModel:
    """Load a saved model from its folder: a modular one, or any supported decoder.

    Raises:
        ConfigError: It is not a whole model, or not a supported one.
    """
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder / 'config.json'}: not readable as JSON settings") from error
    if kind != "mode":
        return load_model(Backbone(name=folder.name, path=str(folder))).eval()
    from safetensors import SafetensorError

    from mode.modular.model import MoDEForCausalLM

    try:
        model: PreTrainedModel = MoDEForCausalLM.from_pretrained(folder).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{folder}: cannot load this model: {reason}") from error
    return model


def find_model(name: str, runs: Path) -> FoundModel:
    """Load a run's model by the run's id, or a saved model by its folder.

    Raises:
        ConfigError: There is neither, or its weights are not here.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").exists():
        return FoundModel(
            load_folder(folder), load_tokenizer(Backbone(name=folder.name, path=str(folder))), folder, None
        )
    if folder.is_dir() and name not in {path.name for path in runs.glob("*")}:
        raise ConfigError(f"{name}: a folder without a config.json, so not a model")
    run = find_run(name, runs)
    prepared = prepare_run(run)
    model = prepared.method.plain(restore(prepared))
    return FoundModel(model.eval(), load_tokenizer(run.backbone), locate(run.backbone), run)


def find_expert_folder(name: str, runs: Path, domains: Collection[str]) -> Path:
    """Return the folder of experts: one expert's, a saved model's, its run's, or by its run's id or the start of it.

    Args:
        name: What the expert is called.
        runs: Folder of runs.
        domains: Names that a domain could have meant, for the answer to a mistake.

    Raises:
        ConfigError: There is no expert of that name.
    """
    here = Path(name).expanduser()
    places = [here, here / "expert", *sorted(path / "expert" for path in runs.glob("*") if path.name.startswith(name))]
    found = [place for place in places if (place / ABOUT).exists()]
    if not found and (here / "config.json").exists():
        return here
    if found and (len(found) == 1 or found[0] in places[:2]):
        return found[0]
    if found:
        raise ConfigError(f"{name}: {len(found)} runs begin with it")
    raise ConfigError(
        f"{name}: neither a domain, nor a run in {runs}, nor a folder with an expert{suggest(name, domains)}"
    )


def list_branches(recalled: FoundModel) -> tuple[str, ...]:
    """Return the names of a modular model's branches, the backbone's first; none for another model."""
    experts = getattr(recalled.model.config, "experts", None)
    return ("backbone", *experts) if experts else ()
