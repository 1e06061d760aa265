"""Plain data to checked settings, with the first mistake in one line."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from mode.config.groups import list_members
from mode.config.identity import describe_run
from mode.config.registry import find_method
from mode.config.run import MethodSettings, Run
from mode.core.errors import ConfigError, suggest


def check_run(plain: dict[str, Any], extra: Path | None = None) -> Run:
    """Turn composed plain data into a checked run, without the domains that it does not use.

    Raises:
        ConfigError: A setting is unknown or not allowed, or a domain does not exist.
    """
    plain = dict(plain)
    plain.pop("experiment", None)
    plain["method"] = build_method(plain["method"])
    run: Run = validate(Run, plain, "")
    wanted = dict.fromkeys([*run.targets, *run.scored])
    for name in wanted:
        if name not in run.domains:
            known = list_members("domain", extra)
            raise ConfigError(f"domain {name}: not one of {', '.join(known)}{suggest(name, known)}")
    if len(set(run.targets)) != len(run.targets):
        raise ConfigError(f"targets={list(run.targets)}: a domain is named twice")
    taken = list(run.targets)
    for key, names in (("train.replay", run.train.replay or ()), ("method.anchor.source", run.method.reads())):
        if twice := [name for name in names if name in taken]:
            raise ConfigError(
                f"{key}: {twice[0]} is one of targets={list(run.targets)} or replayed, so trained on already"
            )
        taken += names
    used: Run = replace_settings(run, domains={name: run.domains[name] for name in wanted})
    return used


def build_method(node: Mapping[str, Any]) -> MethodSettings:
    """Build a method from its YAML; only registered classes are ever imported.

    Raises:
        ConfigError: The target is not registered, is missing, or is not a method, or a setting is wrong.
    """
    settings = dict(node)
    cls = find_method(str(settings.pop("_target_", "")))
    method: MethodSettings = validate(cls, settings, "method")
    return method


def validate(cls: type, plain: Mapping[str, Any], prefix: str) -> Any:
    """Check plain data against a settings class and put the first mistake in one line."""
    try:
        return TypeAdapter(cls).validate_python(plain)
    except ValidationError as error:
        raise ConfigError(explain(error, cls, prefix)) from error


def explain(error: ValidationError, cls: type, prefix: str) -> str:
    """Put the first mistake that pydantic found in one line; an unknown setting goes before one that is missing."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    first = min(error.errors(include_url=False), key=lambda item: item["type"] not in unknown)
    path = [part for part in (prefix, *map(str, first["loc"])) if part]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in unknown:
        siblings = [".".join([*path[:-1], name]) for name in sorted(field_names(cls, first["loc"][:-1]))]
        return f"{'.'.join(path)}: no such setting{suggest('.'.join(path), siblings)}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{'.'.join(path)}: this setting is missing"
    value = first["input"]
    shown = (
        "" if isinstance(value, dict) or is_dataclass(value) or "ArgsKwargs" in type(value).__name__ else f"={value}"
    )
    return f"{'.'.join(path)}{shown}: {message}"


def field_names(cls: Any, path: Sequence[int | str] = ()) -> set[str]:
    """Return the names of the fields of a settings class, or of the one at a path inside it.

    >>> sorted(field_names(Run, ["budget"])), "licence" in field_names(Run, ["domains", "code"])
    (['expert_layers', 'num_blocks', 'policy'], True)
    """
    for part in path:
        if is_dataclass(cls):
            cls = typing.get_type_hints(cls).get(str(part))
        elif typing.get_origin(cls) in (dict, tuple):  # the type of a value of either
            cls = [item for item in typing.get_args(cls) if item is not ...][-1]
        else:
            return set()
    return {item.name for item in fields(cls)} if is_dataclass(cls) else set()


def replace_settings(instance: Any, **changes: Any) -> Any:
    """Return a copy of a settings object with some fields changed, checked again."""
    values = {item.name: getattr(instance, item.name) for item in fields(instance)}
    return type(instance)(**{**values, **changes})


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names.

    >>> flatten({"train": {"lr": 1}, "seed": 0})
    {'train.lr': 1, 'seed': 0}
    """
    values: dict[str, Any] = {}
    for key, value in node.items():
        nested = isinstance(value, Mapping)
        values |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return values


def to_yaml(run: Run) -> str:
    """Render a run's resolved configuration for people."""
    plain = json.loads(json.dumps(asdict(run)))
    plain["method"] = {"_target_": describe_run(run)["method"]["_target_"], **plain["method"]}
    return yaml.safe_dump(plain, sort_keys=False)


def from_yaml(text: str) -> Run:
    """Read what `to_yaml` wrote.

    Raises:
        ConfigError: A setting is unknown or not allowed.
    """
    return check_run(yaml.safe_load(text))
