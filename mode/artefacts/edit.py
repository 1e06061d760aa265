"""Experts of saved models: chosen, taken out, joined, and averaged into the backbone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mode.artefacts.find import FoundModel, list_branches
from mode.core.errors import ConfigError, suggest
from mode.modular.artefact import check_fits, describe_fit, load_experts
from mode.modular.experts import extract_expert_state

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from mode.records.score import Score


def list_experts(recalled: FoundModel) -> tuple[str, ...]:
    """Return the names of a modular model's experts.

    Raises:
        ConfigError: The model has no experts.
    """
    names = list_branches(recalled)[1:]
    if not names:
        raise ConfigError("this model has no experts; that is for MoDE models")
    return names


def extract_states(recalled: FoundModel) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of every expert of a modular model, by name.

    Raises:
        ConfigError: The model has no experts.
    """
    return {name: extract_expert_state(recalled.model, index) for index, name in enumerate(list_experts(recalled))}


def keep_experts(recalled: FoundModel, names: Sequence[str]) -> PreTrainedModel:
    """Return a modular model with some of its experts alone; consumes the one given.

    Raises:
        ConfigError: It has no such expert, or none would be left.
    """
    from mode.modular.edit import replace_experts

    found = extract_states(recalled)
    check_known(names, found)
    if not names:
        raise ConfigError("without experts the bare backbone is left")
    model: Any = recalled.model
    return replace_experts(model, {name: found[name] for name in names})


def remove_expert(recalled: FoundModel, name: str) -> PreTrainedModel:
    """Return a modular model with one expert less; consumes the one given.

    Raises:
        ConfigError: It has no such expert, or none would be left.
    """
    names = list_experts(recalled)
    check_known([name], names)
    return keep_experts(recalled, [other for other in names if other != name])


def check_known(names: Sequence[str], found: Collection[str]) -> None:
    """Refuse a name that no expert has."""
    for name in names:
        if name not in found:
            raise ConfigError(f"{name}: not one of the experts {', '.join(found)}{suggest(name, found)}")


def join_experts(recalled: FoundModel, folder: Path) -> PreTrainedModel:
    """Return a modular model with the experts of a folder beside its own; consumes the one given.

    Raises:
        ConfigError: An expert is damaged, made for another backbone or other blocks, or its name is taken.
    """
    from mode.modular.edit import replace_experts

    found, model = extract_states(recalled), recalled.model
    config: Any = model.config
    wanted = {
        "backbone": config.backbone.get("name"),
        "backbone_fingerprint": config.backbone.get("fingerprint"),
        **describe_fit(config, config.gates),
    }
    for name, expert in load_experts(folder).items():
        check_fits(expert.about, wanted, folder)
        if name in found:
            raise ConfigError(f"{folder}: the model has an expert for {name} already; remove that first")
        found[name] = expert.tensors
    return replace_experts(model, found)


def check_mergeable(model: PreTrainedModel) -> None:
    """Refuse a model whose layers have no partners to merge with.

    Raises:
        ConfigError: It has more than one expert, or an expert does not have as many layers as a block, or changes the
            head.
    """
    config: Any = model.config
    per_block = config.decoder.num_hidden_layers // config.num_blocks
    if len(config.experts) != 1:
        raise ConfigError(f"only one expert can be merged: keep one of {', '.join(config.experts)} with --experts")
    if config.head_rank:
        raise ConfigError("only experts without a change of the head can be merged: this one has method.head_rank")
    if config.expert_layers != per_block:
        raise ConfigError(
            f"only experts with as many layers as their block can be merged: {config.expert_layers} here, "
            f"beside {per_block} of the backbone"
        )


def merge_expert(model: Any, shares: Sequence[float]) -> PreTrainedModel:
    """Merge a modular model's only expert into its backbone: a decoder without gates; consumes the model.

    A layer becomes (1 - share) of the backbone's and share of the expert's weights. That is exact where a share is 0
    or 1, or where the two are equal; elsewhere it is an approximation, since the mean of two layers' outputs is not the
    output of their mean.

    Args:
        model: A modular model with one expert, for which `check_mergeable` has nothing to say.
        shares: Weight of the expert in every block, such as its mean gate on validation text.
    """
    import torch

    from mode.modular.edit import extract_backbone

    with torch.no_grad():
        for block, share in zip(model.blocks, shares, strict=True):
            pairs = zip(block.backbone.parameters(), block.experts[0].parameters(), strict=True)
            for ours, theirs in pairs:
                ours.lerp_(theirs, share)
    return extract_backbone(model)


def merge_and_measure(model: PreTrainedModel, recalled: FoundModel) -> tuple[PreTrainedModel, Score, Score]:
    """Merge a model's only expert by its mean gates on its domain's validation split; consumes the model.

    Args:
        model: A modular model with one expert.
        recalled: Where it comes from.

    Returns:
        The merged model, and the scores on that split of the model with gates and of the merged one.

    Raises:
        ConfigError: The model cannot be merged, or nothing says what text its expert trained on.
    """
    from mode.gating.meter import GateMeter, watch_gates
    from mode.runs.fit import score_domains
    from mode.runs.prepare import prepare_run

    list_experts(recalled)
    check_mergeable(model)
    config: Any = model.config
    (name,) = config.experts
    if recalled.run is None or name not in recalled.run.domains:
        raise ConfigError(f"merging measures the gates on the text of {name}: name the run that trained on it")
    prepared = prepare_run(recalled.run)
    with watch_gates(model) as latest:
        meter = GateMeter(latest)
        before = score_domains(prepared, model, "validation", (name,), probe=meter)[name]
    plain = merge_expert(model, [means[1] for means in meter.result()[name]["mean"]])
    return plain, before, score_domains(prepared, plain, "validation", (name,))[name]
