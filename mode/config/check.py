"""Check plain data against the classes of settings, and report the first mistake in one line."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from mode.config.data import Domain
from mode.config.groups import list_members, read_group
from mode.config.identity import describe_run
from mode.config.method import NONE, SELF
from mode.config.names import rename_settings, suggest_setting
from mode.config.parse import parse_yaml
from mode.config.registry import find_method
from mode.config.run import MethodSettings, Run
from mode.core.errors import ConfigError, suggest
from mode.core.escape import shorten


def check_run(plain: dict[str, Any], extra: Path | None = None) -> Run:
    """Return a checked run from composed plain data. Domains that the run does not use are dropped.

    Args:
        plain: Settings of the run; old names are accepted. A domain whose file cannot be read is an error in the place
            of its settings, which counts only if the run uses the domain.
        extra: A folder of the user's own configuration.

    Raises:
        ConfigError: A setting is unknown or not allowed, or a domain does not exist.
    """
    plain = rename_settings(plain)
    plain.pop("experiment", None)
    domains = expect_settings(plain, "domains")
    plain["method"] = build_method(expect_settings(plain, "method"))
    run: Run = validate(Run, plain | {"domains": {}}, "")
    if words := [name for name in domains if name in (SELF, NONE)]:
        raise ConfigError(f"domain {words[0]}: this name is a value of method.anchor.source; rename the domain")
    wanted = dict.fromkeys([*run.targets, *run.scored])
    for name in wanted:
        if name not in domains:
            known = list_members("domain", extra)
            raise ConfigError(f"domain {name}: not one of {', '.join(known)}{suggest(name, known)}")
    if len(set(run.targets)) != len(run.targets):
        raise ConfigError(f"targets={list(run.targets)}: a domain is named twice")
    taken = list(run.targets)
    for key, names in (
        ("train.batch.replay", run.train.batch.replay or ()),
        ("method.anchor.source", run.method.reads()),
    ):
        if twice := [name for name in names if name in taken]:
            raise ConfigError(
                f"{key}: {twice[0]} is trained on already, as one of targets={list(run.targets)} or as replay"
            )
        taken += names
    used: Run = replace_settings(run, domains={name: build_domain(name, domains[name]) for name in wanted})
    return used


def expect_settings(plain: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a group of plain settings.

    Raises:
        ConfigError: The group is missing, or is a single value.
    """
    if not isinstance(plain.get(key), Mapping):
        raise ConfigError(f"{key}={shorten(plain.get(key))}: expected settings of the form KEY: VALUE")
    found: Mapping[str, Any] = plain[key]
    return found


def build_domain(name: str, settings: Mapping[str, Any] | ConfigError) -> Domain:
    """Return a domain from its settings.

    Args:
        name: Name of the domain.
        settings: Its settings, or the error if its file cannot be read.

    Raises:
        ConfigError: Its file cannot be read, or a setting is wrong.
    """
    if isinstance(settings, ConfigError):
        raise settings
    domain: Domain = validate(Domain, settings, f"domains.{name}")
    return domain


def build_method(node: Mapping[str, Any], place: str = "method") -> MethodSettings:
    """Return a method from its YAML. Only classes of this project and registered classes are imported.

    Args:
        node: The settings, with `_target_`.
        place: Dotted name of the settings, for messages.

    Raises:
        ConfigError: `_target_` is missing, not registered or not a method, or a setting is wrong.
    """
    settings = dict(node)
    cls = find_method(str(settings.pop("_target_", "")))
    method: MethodSettings = validate(cls, settings, place)
    return method


def validate(cls: type, plain: Mapping[str, Any], prefix: str) -> Any:
    """Return an instance of a settings class from plain data.

    Args:
        cls: The class.
        plain: The settings.
        prefix: Dotted name of the settings, for messages.

    Raises:
        ConfigError: A setting is unknown, missing or not allowed.
    """
    try:
        checked: Any = TypeAdapter(cls).validate_python(plain)
    except ValidationError as error:
        raise ConfigError(explain(error, cls, prefix)) from error
    if (place := find_boolean_number(plain, checked)) is not None:
        raise ConfigError(
            f"{'.'.join(part for part in (prefix, *place) if part)}: expected a number, not true or false"
        )
    return checked


def find_boolean_number(plain: Any, checked: Any) -> tuple[str, ...] | None:
    """Return the path to a boolean that pydantic turned into a number; None if there is none.

    >>> find_boolean_number({"size": [1, True]}, {"size": (1, 1)})
    ('size', '1')

    Args:
        plain: The settings as given.
        checked: The same settings after the check: a settings object, or a part of one.
    """
    if isinstance(plain, bool):
        return None if isinstance(checked, bool) else ()
    if isinstance(plain, Mapping):
        found = vars(checked) if is_dataclass(checked) else checked
        pairs = [(str(key), inner, found[key]) for key, inner in plain.items() if key in found]
    elif isinstance(plain, list | tuple):
        pairs = [(str(place), *pair) for place, pair in enumerate(zip(plain, checked, strict=False))]
    else:
        return None
    places = ((key, find_boolean_number(inner, other)) for key, inner, other in pairs)
    return next(((key, *place) for key, place in places if place is not None), None)


def validate_member(cls: type, group: str, name: str, extra: Path | None = None) -> Any:
    """Return an instance of a settings class from the YAML file of a member of a group.

    Raises:
        ConfigError: There is no such file, or a setting is unknown, missing or not allowed.
    """
    plain = read_group(group, name, extra)
    try:
        return validate(cls, plain, "")
    except ConfigError as error:
        raise ConfigError(f"{group}/{name}.yaml: {error}") from error


def explain(error: ValidationError, cls: type, prefix: str) -> str:
    """Describe pydantic's first error in one line. An unknown setting is reported before a missing one."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    first = min(error.errors(include_url=False), key=lambda item: item["type"] not in unknown)
    path = [part for part in (prefix, *map(str, first["loc"])) if part]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in unknown:
        known = {".".join([*path[:-1], name]) for name in field_names(cls, first["loc"][:-1], nested=True)}
        return f"{'.'.join(path)}: no such setting{suggest_setting('.'.join(path), known)}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{'.'.join(path)}: this setting is missing"
    if path and f"{'.'.join(path)}." in message:  # it names the settings itself
        return message
    value = first["input"]
    nested = isinstance(value, dict) or is_dataclass(value) or "ArgsKwargs" in type(value).__name__
    shown = "" if nested else f"={shorten(value)}"
    return f"{'.'.join(path)}{shown}: {message}" if path else message


def field_names(cls: Any, path: Sequence[int | str] = (), *, nested: bool = False) -> set[str]:
    """Return the names of the fields of a settings class, or of a settings class inside it.

    Args:
        cls: The class.
        path: Path to the class inside it: names of fields, keys, and indices of items.
        nested: Whether to include the fields of its groups, by dotted name.

    >>> sorted(field_names(Run, ["budget"])), "licence" in field_names(Run, ["domains", "code"])
    (['expert_layers', 'num_blocks', 'policy'], True)
    """
    for part in path:
        if is_dataclass(cls):
            cls = typing.get_type_hints(cls).get(str(part))
        elif typing.get_origin(cls) in (dict, tuple):  # the type of the values
            cls = [item for item in typing.get_args(cls) if item is not ...][-1]
        else:
            return set()
    if not is_dataclass(cls):
        return set()
    names = {item.name for item in fields(cls)}
    inner = (
        {f"{group}.{name}" for group in names for name in field_names(cls, [group], nested=True)} if nested else set()
    )
    return names | inner


def replace_settings(instance: Any, **changes: Any) -> Any:
    """Return a checked copy of a settings object with some fields changed.

    A dotted name changes a setting in a group: `replace_settings(run, **{"train.batch.size": 4})`.
    """
    values = {item.name: getattr(instance, item.name) for item in fields(instance)}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        group, _, rest = name.partition(".")
        if rest:
            inner.setdefault(group, {})[rest] = value
        else:
            values[name] = value
    for group, settings in inner.items():
        values[group] = replace_settings(values[group], **settings)
    return type(instance)(**values)


def fill_defaults(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain settings of a run, with the defaults of its classes for settings that are not given."""
    filled = fill_defaults_of(Run, plain)
    try:
        cls = find_method(str(plain["method"]["_target_"]))
    except (ConfigError, KeyError, TypeError):  # reported when the run is checked
        return filled
    return filled | {"method": fill_defaults_of(cls, plain["method"])}


def fill_defaults_of(cls: type, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain settings of a class, with its defaults for settings that are not given, group by group."""
    filled = dict(plain)
    kinds: dict[str, Any] = typing.get_type_hints(cls)
    for item in fields(cls):
        kind, given = kinds[item.name], plain.get(item.name, {})
        if item.default is MISSING and is_dataclass(kind) and isinstance(given, Mapping):
            filled[item.name] = fill_defaults_of(kind, given)  # type: ignore[arg-type]
        elif is_dataclass(item.default) and isinstance(given, Mapping):
            filled[item.name] = fill_defaults_of(type(item.default), given)
        elif item.default is not MISSING:
            filled.setdefault(item.name, item.default)
    return filled


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as a flat mapping with dotted names.

    >>> flatten({"train": {"lr": 1}, "seed": 0})
    {'train.lr': 1, 'seed': 0}
    """
    values: dict[str, Any] = {}
    for key, value in node.items():
        nested = isinstance(value, Mapping)
        values |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return values


def to_yaml(run: Run) -> str:
    """Return a run's resolved configuration as YAML."""
    plain = json.loads(json.dumps(asdict(run)))
    plain["method"] = {"_target_": describe_run(run)["method"]["_target_"], **plain["method"]}
    return yaml.safe_dump(plain, sort_keys=False)


def from_yaml(text: str | bytes, source: Path | str = "the settings of a run") -> Run:
    """Return the run that `to_yaml` wrote.

    Args:
        text: The settings as text, or the bytes of a file.
        source: Where they come from, for messages.

    Raises:
        ConfigError: The text is not YAML, or a setting is unknown or not allowed.
    """
    plain = parse_yaml(text, source)
    if not isinstance(plain, dict):
        raise ConfigError(f"{source}: expected settings of the form KEY: VALUE")
    try:
        return check_run(plain)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
