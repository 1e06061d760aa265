"""The command that repeats a run, from its record. It contains only the settings that differ from the defaults."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from mode.config import identity
from mode.config.compose import compose as compose_run
from mode.config.groups import list_members, list_written, read_group
from mode.config.names import rename_settings
from mode.config.quoting import format_value
from mode.config.registry import find_method
from mode.config.run import Run
from mode.core.errors import ConfigError
from mode.records.record import Record


def write_commands(records: Sequence[Record], extra: Path | None = None) -> dict[str, tuple[str, bool]]:
    """Return, by run id, the command for the same run and True; or the reason why there is none, and False.

    Args:
        records: Records of the runs.
        extra: A folder of the user's own configuration. The commands name it.
    """
    compose = cache(lambda overrides: compose_run(overrides, extra))  # many records share their first overrides
    found = {}
    for record in records:
        try:
            found[record.id] = (write_command(record, extra, compose), True)
        except ConfigError as error:
            found[record.id] = (str(error), False)
    return found


def write_command(record: Record, extra: Path | None, compose: Callable[[tuple[str, ...]], Run]) -> str:
    """Return the command of one record.

    Args:
        record: The record.
        extra: A folder of the user's own configuration.
        compose: Composes a run from overrides.

    Raises:
        ConfigError: Today's configuration cannot express the run, or the record does not name all inputs of the run.
    """
    if "artefacts" in record.asked:
        raise ConfigError("the run composed experts from folders, and the record does not name the folders")
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
        raise ConfigError("its settings are from another version and do not compose")
    return shlex.join([*words, *settings, *(["--conf", str(extra)] if extra else [])])


def write_variant(record: Record, extra: Path | None = None) -> str:
    """Return the settings of a record's method and replay that differ from the method's YAML, as overrides.

    Raises:
        ConfigError: No YAML configures the method.
    """
    run = compose_run((f"method={find_method_name(record.request.method, extra)}",), extra)
    usual, replay = identity.describe_run(run), record.asked["train"].get("replay")
    changed = list_differences(record.asked["method"], usual["method"], run.method, "method.")
    return shlex.join([*changed, *([f"train.batch.replay={format_value(replay)}"] if replay else [])])


def describe_method(record: Record, extra: Path | None) -> tuple[str, str]:
    """Return the name of a record's method and the settings that differ from the method's YAML.

    Without a YAML these are the name of its class and an empty text.
    """
    try:
        return find_method_name(record.request.method, extra), write_variant(record, extra)
    except ConfigError:
        return record.request.method_name, ""


def split_opening(asked: Mapping[str, Any], extra: Path | None) -> tuple[list[str], list[str]]:
    """Return the first words of a run's command, and the overrides that these words imply."""
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
    """Return the name of the YAML of a method, from its name in records. Of several YAMLs, the shortest name is used.

    Raises:
        ConfigError: There is no such YAML.
    """
    name = list_recorded(extra, list_written(extra)).get(target)
    if name is None:
        raise ConfigError(f"{target}: no YAML configures this method")
    return name


@lru_cache
def list_recorded(extra: Path | None, written: tuple[tuple[Path, int], ...]) -> dict[str | None, str]:
    """Return the name of the YAML of every method by its name in records. `written` is as in `compose_groups`."""
    shortest_last = sorted(list_members("method", extra), key=len)[::-1]
    return {recorded_as(name, extra): name for name in shortest_last}


def recorded_as(name: str, extra: Path | None) -> str | None:
    """Return a method's name in records, from the name of its YAML; None if the YAML or the class cannot be read."""
    try:
        return find_method(str(read_group("method", name, extra)["_target_"])).recorded_name()
    except (ConfigError, KeyError):
        return None


def list_changes(wanted: Mapping[str, Any], found: Mapping[str, Any], run: Run) -> list[str]:
    """Return the overrides that turn one configuration into another, without backbone and budget.

    Args:
        wanted: The configuration of the record, by names in records.
        found: The configuration of `run`, by names in records.
        run: The run to start from.
    """
    return list_differences(
        {name: value for name, value in rename_settings(wanted).items() if name not in ("backbone", "budget")},
        {name: value for name, value in rename_settings(found).items() if name not in ("backbone", "budget")},
        run,
        "",
    )


def list_differences(wanted: Mapping[str, Any], found: Mapping[str, Any], settings: Any, prefix: str) -> list[str]:
    """Return overrides for the settings that differ. A setting that a record leaves out has the default of its class.

    Args:
        wanted: Settings to reach, by today's names.
        found: Settings to start from, by today's names.
        settings: Settings object that `found` describes.
        prefix: Dotted name of the group, with a dot at the end.
    """
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
