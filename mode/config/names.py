"""Names of settings: today's names, and the old names, which records keep and which are still accepted."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from mode.core.errors import ConfigError, suggest

RECORDED = {
    "train.batch.size": "train.batch_size",
    "train.batch.gradient_accumulation_steps": "train.accumulate",
    "train.optim.warmup_ratio": "train.warmup",
    "train.optim.min_lr_ratio": "train.final_lr",
    "train.optim.weight_decay": "train.weight_decay",
    "train.optim.betas": "train.betas",
    "train.optim.max_grad_norm": "train.clip",
    "train.batch.examples": "train.examples",
    "train.memory.activation_checkpointing": "train.activation_checkpointing",
    "train.memory.budget_gb": "train.memory",
    "train.kernels.compile": "train.compile",
    "train.memory.frozen_weights": "train.frozen_weights",
    "train.batch.intra_document_masking": "train.documents",
    "train.kernels.attention": "train.attention",
    "train.kernels.branch_execution": "train.branches",
    "train.kernels.cuda_graph": "train.graph",
    "train.parallelism.strategy": "train.layout",
    "train.parallelism.microbatches_in_flight": "train.in_flight",
    "train.parallelism.placement": "train.placement",
    "train.batch.replay": "train.replay",
    "evaluate.logit_chunk_size": "evaluate.chunk",
}
"""From today's name of a setting to its name in records. Names in records never change."""


OLD_NAMES = {old: new for new, old in RECORDED.items()}
"""From the old name of a setting, which is still accepted, to today's name."""


RECORDED_VALUES: dict[str, dict[Any, Any]] = {"train.batch.intra_document_masking": {False: "joined", True: "apart"}}
"""From today's values of a setting to its values in records, by today's name."""


GROUPED = {new.rpartition(".")[0] for new in RECORDED} | {old.rpartition(".")[0] for old in OLD_NAMES}
"""Groups with a setting that was renamed, by the old or the new name."""


REFERENCE = re.compile(r"(?<!\\)(\$\{\s*)([A-Za-z_][\w.]*)(?=\s*\})")
"""The beginning of an interpolation of a setting by its full name, such as `${train.lr}`."""


def rename_name(name: str) -> str:
    """Return the name of today for one of an earlier version, or for a name below one; others are returned as is.

    >>> rename_name("train.clip"), rename_name("train.replay.english"), rename_name("train.memory.budget_gb")
    ('train.optim.max_grad_norm', 'train.batch.replay.english', 'train.memory.budget_gb')
    """
    if name in OLD_NAMES:
        return OLD_NAMES[name]
    above = (old for old in OLD_NAMES if old not in GROUPED and name.startswith(f"{old}."))
    old = next(above, "")
    return OLD_NAMES[old] + name.removeprefix(old) if old else name


def rename_references(value: Any) -> Any:
    """Return a value with the settings of earlier versions by the names of today in all its interpolations.

    >>> rename_references({"seed": "${train.clip}", "lr": ["${train.lr}"]})
    {'seed': '${train.optim.max_grad_norm}', 'lr': ['${train.lr}']}
    """
    if isinstance(value, Mapping):
        return {key: rename_references(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rename_references(inner) for inner in value]
    if isinstance(value, str):
        return REFERENCE.sub(lambda found: found[1] + rename_name(found[2]), value)
    return value


def rename_setting(name: str, value: Any) -> tuple[str, Any]:
    """Return today's name and value of a setting. In a group, the settings inside are renamed.

    >>> rename_setting("train.documents", "apart")
    ('train.batch.intra_document_masking', True)
    >>> rename_setting("train", {"clip": 1})
    ('train', {'optim': {'max_grad_norm': 1}})
    """
    if isinstance(value, Mapping) and name in GROUPED:
        return name, rename_settings(value, f"{name}.")
    new = rename_name(name)
    return new, update_value(new, value)


def rename_settings(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by today's names. Settings with old names move to their groups of today.

    Raises:
        ConfigError: A setting has different values under its old and its new name.
    """
    renamed: dict[str, Any] = copy.deepcopy(dict(node))
    moved = {}
    for old in OLD_NAMES:
        place, name = find_place(renamed, old.removeprefix(prefix)) if old.startswith(prefix) else (None, "")
        if place is not None and name in place and not (old in GROUPED and isinstance(place[name], Mapping)):
            moved[old] = place.pop(name)
    for old, value in moved.items():
        new, value = rename_setting(old, value)
        place, name = make_place(renamed, new.removeprefix(prefix))
        check_same(old, value, new, place.get(name, value))
        place[name] = value
    return renamed


def check_same(old: str, value: Any, new: str, other: Any) -> None:
    """Check that one setting has the same value under its old and its new name.

    Raises:
        ConfigError: The values differ.
    """
    if value != other:
        raise ConfigError(f"{old}={value}: {new}={other} is the same setting under its new name; give one of them")


def check_spellings(given: Mapping[str, Any]) -> None:
    """Refuse settings that have different values under their old and their new name.

    Args:
        given: Values by the dotted names that they were written under; no value is a group.

    Raises:
        ConfigError: Two values of one setting differ, or one name is a group of the other.
    """
    for old, value in given.items():
        new, value = rename_setting(old, value)
        others = (name for name in given if name == rename_name(name)) if new != old else ()
        for other in others:
            if f"{new}.".startswith(f"{other}.") or f"{other}.".startswith(f"{new}."):
                check_same(old, value, other, given[other])


def update_value(new: str, value: Any) -> Any:
    """Return today's value for an old value of a setting. Other values are returned unchanged."""
    values = {str(recorded): today for today, recorded in RECORDED_VALUES.get(new, {}).items()}
    return values.get(str(value), value) if values else value


def find_place(node: dict[str, Any], name: str) -> tuple[dict[str, Any] | None, str]:
    """Return the group of a dotted name and the last part of the name. The group is None if it does not exist."""
    *groups, leaf = name.split(".")
    place: Any = node
    for group in groups:
        place = place.get(group) if isinstance(place, dict) else None
    return place if isinstance(place, dict) else None, leaf


def make_place(node: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """Return the group of a dotted name and the last part of the name. A missing group is created."""
    *groups, leaf = name.split(".")
    for group in groups:
        if not isinstance(node.get(group), dict):
            node[group] = {}
        node = node[group]
    return node, leaf


def record_names(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings by their names and values in records. Groups that become empty are removed."""
    recorded = copy.deepcopy(dict(plain))
    moved = {}
    for new, old in RECORDED.items():
        place, name = find_place(recorded, new)
        if place is not None and name in place:
            value = place.pop(name)
            moved[old] = RECORDED_VALUES[new][value] if new in RECORDED_VALUES else value
            remove_if_empty(recorded, new.rpartition(".")[0])
    for old, value in moved.items():
        place, name = make_place(recorded, old)
        place[name] = value
    return recorded


def remove_if_empty(node: dict[str, Any], group: str) -> None:
    """Remove an empty group from nested settings, unless it is at the top level."""
    place, name = find_place(node, group)
    if place is not None and "." in group and place.get(name) == {}:
        del place[name]


def suggest_setting(name: str, known: set[str] | frozenset[str]) -> str:
    """Return a suggestion for an unknown name. Old names are compared too, but today's name is suggested.

    >>> suggest_setting("train.accumulates", {"train.steps", "train.batch.gradient_accumulation_steps"})
    '; did you mean train.batch.gradient_accumulation_steps?'
    >>> suggest_setting("train.max_grad_norm", {"train.log_every", "train.optim.max_grad_norm"})
    '; did you mean train.optim.max_grad_norm?'
    """
    head, _, leaf = name.rpartition(".")
    same = [each for each in known if each.rpartition(".")[2] == leaf and each.startswith(f"{head.partition('.')[0]}.")]
    if len(same) == 1:
        return f"; did you mean {same[0]}?"
    old = {each: new for each, new in OLD_NAMES.items() if new in known}
    found = suggest(name, sorted({*known, *old}))
    nearest = found.removeprefix("; did you mean ").removesuffix("?")
    return f"; did you mean {old[nearest]}?" if nearest in old and nearest not in known else found
