"""The command that makes a run, written from its record: the settings that differ from the defaults, and no others."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mode.config import identity
from mode.config.compose import compose as compose_run
from mode.config.compose import format_value
from mode.config.groups import list_members, read_group
from mode.config.names import rename_settings
from mode.config.registry import find_method
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.records.record import Record


def write_commands(records: Sequence[Record], extra: Path | None = None) -> dict[str, tuple[str, bool]]:
    """Return, by run id, the command that asks for the same run and True, or why there is none and False.

    Args:
        records: Records of the runs.
        extra: A folder of the user's own configuration, named in the commands.
    """
    compose = cache(lambda overrides: compose_run(overrides, extra))  # many records have a beginning in common
    found = {}
    for record in records:
        try:
            found[record.id] = (write_command(record, extra, compose), True)
        except ConfigError as error:
            found[record.id] = (str(error), False)
    return found


def write_command(record: Record, extra: Path | None, compose: Callable[[tuple[str, ...]], Run]) -> str:
    """Write the command of one record.

    Raises:
        ConfigError: Today's configuration does not lead to what was asked, or the record does not say all of it.
    """
    if "artefacts" in record.asked:
        raise ConfigError("composed of experts from folders that the record does not name")
    words, implied = split_opening(record.asked, extra)
    run = compose(tuple(implied))
    pairs = (
        ("backbone", record.asked["backbone"]["name"], run.backbone.name),
        ("budget", record.asked["budget"]["policy"], run.budget.policy),
    )
    chosen = [f"{group}={name}" for group, name, usual in pairs if name != usual]
    run = compose((*implied, *chosen))
    settings = chosen + list_changes(record.asked, identity.describe_run(run), run)
    again = compose((*implied, *settings))
    if identity.describe_run(again) | {"backbone": {"name": again.backbone.name}} != record.asked:
        raise ConfigError("its settings are of another version and do not compose")
    return shlex.join([*words, *settings, *(["--conf", str(extra)] if extra else [])])


def write_variant(record: Record, extra: Path | None = None) -> str:
    """Return what a record's method and training mix have that their configuration has not, as overrides.

    Raises:
        ConfigError: No method of its class is configured.
    """
    run = compose_run((f"method={find_method_name(record.request.method, extra)}",), extra)
    usual, replay = identity.describe_run(run), record.asked["train"].get("replay")
    changed = list_differences(record.asked["method"], usual["method"], run.method, "method.")
    return shlex.join([*changed, *([f"train.batch.replay={format_value(replay)}"] if replay else [])])


def split_opening(asked: Mapping[str, Any], extra: Path | None) -> tuple[list[str], list[str]]:
    """Return the words of the command that a run belongs to, and the overrides that it stands for."""
    method, targets = asked["method"], asked["targets"]
    named = f"targets=[{','.join(targets)}]"
    name = find_method_name(method["_target_"], extra)
    if name == "pretrain":
        return ["mode", "train", "backbone"], ["experiment=pretrain_tiny", "method=pretrain"]
    if name != "mode":
        return ["mode", "train", "baseline", name, "--domain", ",".join(targets)], [f"method={name}", named]
    if method["start"] == "experts":
        frozen = not method["train_experts"]
        words = ["mode", "compose", *targets, *(["--frozen"] if frozen else [])]
        return words, ["method=mode", named, *(["method.train_experts=false"] if frozen else [])]
    fresh = ["method=mode", "method.start=fresh"]
    if len(targets) == method["num_experts"] == 1:
        return ["mode", "train", "expert", "--domain", targets[0]], [*fresh, "method.num_experts=1", named]
    return ["mode", "compose", "--uninitialized"], fresh


def find_method_name(target: str, extra: Path | None) -> str:
    """Return the configuration of a method by its name in records; the shortest of several is the plain one.

    Raises:
        ConfigError: There is none.
    """
    names = [name for name in list_members("method", extra) if recorded_as(name, extra) == target]
    if not names:
        raise ConfigError(f"{target}: no method of that class is configured")
    return min(names, key=len)


def recorded_as(name: str, extra: Path | None) -> str | None:
    """Return the name in records of a method's configuration; None where a user's own cannot be read."""
    try:
        return find_method(str(read_group("method", name, extra)["_target_"])).recorded_name()
    except (ConfigError, KeyError):
        return None


def list_changes(wanted: Mapping[str, Any], found: Mapping[str, Any], run: Run) -> list[str]:
    """Return the overrides that lead from what a run asks for to what is wanted."""
    return list_differences(
        {name: value for name, value in rename_settings(wanted).items() if name not in ("backbone", "budget")},
        {name: value for name, value in rename_settings(found).items() if name not in ("backbone", "budget")},
        run,
        "",
    )


def list_differences(wanted: Mapping[str, Any], found: Mapping[str, Any], settings: Any, prefix: str) -> list[str]:
    """Compare setting by setting; one that a record leaves out had the default of its class."""
    defaults = {item.name: item.default for item in fields(settings)}
    overrides: list[str] = []
    for name in dict.fromkeys([*wanted, *found]):
        inner = getattr(settings, name, None)
        if is_dataclass(inner):
            overrides += list_differences(wanted.get(name, {}), found.get(name, {}), inner, f"{prefix}{name}.")
            continue
        value = wanted.get(name, defaults.get(name, MISSING))
        if value is not MISSING and value != found.get(name, defaults.get(name)):
            overrides.append(f"{prefix}{name}={format_value(value)}")
    return overrides
