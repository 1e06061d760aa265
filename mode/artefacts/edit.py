"""Edit the experts of a saved model: keep, remove, add, or average one into the backbone."""

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


def list_experts(source: FoundModel) -> tuple[str, ...]:
    """Return the names of a modular model's experts.

    Raises:
        ConfigError: The model has no experts.
    """
    names = list_branches(source)[1:]
    if not names:
        raise ConfigError("this model has no experts: only MoDE models have experts")
    return names


def extract_states(source: FoundModel) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of every expert of a modular model, by name.

    Raises:
        ConfigError: The model has no experts.
    """
    return {name: extract_expert_state(source.model, index) for index, name in enumerate(list_experts(source))}


def keep_experts(source: FoundModel, names: Sequence[str]) -> PreTrainedModel:
    """Return a modular model with only some of its experts. The given model is consumed.

    Args:
        source: The model.
        names: Experts to keep, in their new order.

    Raises:
        ConfigError: The model has no expert of such a name, or `names` is empty.
    """
    from mode.modular.edit import replace_experts

    states = extract_states(source)
    check_known(names, states)
    if not names:
        raise ConfigError("no expert is named: keep at least one expert")
    model: Any = source.model
    return replace_experts(model, {name: states[name] for name in names})


def remove_expert(source: FoundModel, name: str) -> PreTrainedModel:
    """Return a modular model without one of its experts. The given model is consumed.

    Raises:
        ConfigError: The model has no expert of that name, or no other expert.
    """
    names = list_experts(source)
    check_known([name], names)
    return keep_experts(source, [other for other in names if other != name])


def check_known(names: Sequence[str], experts: Collection[str]) -> None:
    """Refuse names that no expert has."""
    for name in names:
        if name not in experts:
            raise ConfigError(f"{name}: not one of the experts {', '.join(experts)}{suggest(name, experts)}")


def join_experts(source: FoundModel, folder: Path) -> PreTrainedModel:
    """Return a modular model with the experts of a folder added to its own. The given model is consumed.

    Args:
        source: The model.
        folder: Folder of one expert, or of a saved modular model.

    Raises:
        ConfigError: An expert is damaged, does not fit the backbone or the blocks, or has the name of another expert.
    """
    from mode.modular.edit import replace_experts

    states, model = extract_states(source), source.model
    config: Any = model.config
    wanted = {
        "backbone": config.backbone.get("name"),
        "backbone_fingerprint": config.backbone.get("fingerprint"),
        **describe_fit(config, config.gates),
    }
    for name, expert in load_experts(folder).items():
        check_fits(expert.about, wanted, folder)
        if name in states:
            raise ConfigError(f"{folder}: the model already has an expert for {name}; remove that expert first")
        states[name] = expert.tensors
    return replace_experts(model, states)


def check_mergeable(model: PreTrainedModel) -> None:
    """Refuse a model whose expert cannot be merged layer by layer.

    Raises:
        ConfigError: The model has several experts, or its expert has fewer layers than a block, or changes the head.
    """
    config: Any = model.config
    per_block = config.decoder.num_hidden_layers // config.num_blocks
    if len(config.experts) != 1:
        raise ConfigError(f"only one expert can be merged: keep one of {', '.join(config.experts)} with --experts")
    if config.head_rank:
        raise ConfigError("an expert that changes the head cannot be merged: this one has method.head_rank")
    if config.expert_layers != per_block:
        raise ConfigError(
            f"only experts with as many layers as their block can be merged: this expert has {config.expert_layers}, "
            f"a block has {per_block}"
        )


def merge_expert(model: Any, shares: Sequence[float]) -> PreTrainedModel:
    """Merge a modular model's only expert into its backbone. The model is consumed.

    The weights of a merged layer are (1 - share) times the backbone's plus share times the expert's. The merge is exact
    if the share is 0 or 1, or if both layers are equal. Otherwise the merge is an approximation: the mean of two
    layers' outputs is not the output of the mean layer.

    Args:
        model: A modular model with one expert that passes `check_mergeable`.
        shares: Weight of the expert in every block, such as its mean gate on validation text.

    Returns:
        A plain decoder without gates.
    """
    import torch

    from mode.modular.edit import extract_backbone

    with torch.no_grad():
        for block, share in zip(model.blocks, shares, strict=True):
            pairs = zip(block.backbone.parameters(), block.experts[0].parameters(), strict=True)
            for ours, theirs in pairs:
                ours.lerp_(theirs, share)
    return extract_backbone(model)


def merge_and_measure(model: PreTrainedModel, source: FoundModel) -> tuple[PreTrainedModel, Score, Score]:
    """Merge a model's only expert with its mean gates on its domain's validation split. The model is consumed.

    Args:
        model: A modular model with one expert.
        source: The saved model or run that `model` comes from.

    Returns:
        The merged model, then two scores on that split: of the model with gates, and of the merged model.

    Raises:
        ConfigError: The model cannot be merged, or the training data of its expert is not known.
    """
    from mode.gating.meter import GateMeter, watch_gates
    from mode.runs.fit import score_domains
    from mode.runs.prepare import prepare_run

    list_experts(source)
    check_mergeable(model)
    config: Any = model.config
    (name,) = config.experts
    if source.run is None or name not in source.run.domains:
        raise ConfigError(f"merging needs the validation text of {name}: name the run that trained on {name}")
    prepared = prepare_run(source.run)
    with watch_gates(model) as latest:
        meter = GateMeter(latest)
        before = score_domains(prepared, model, "validation", (name,), probe=meter)[name]
    plain = merge_expert(model, [means[1] for means in meter.result()[name]["mean"]])
    return plain, before, score_domains(prepared, plain, "validation", (name,))[name]
