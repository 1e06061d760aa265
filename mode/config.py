"""Compose a run from YAML and overrides, and check it: the only module that knows Hydra and OmegaConf."""

from __future__ import annotations

import copy
import importlib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from mode.checked import ConfigError, nearest
from mode.identity import asked
from mode.settings import MethodSettings, Run

TRUSTED = ("mode.", "baselines.")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
"""Names of configuration files that Hydra's grammar can express."""
GROUPS = ("backbone", "method", "budget", "track", "experiment")
"""Groups of which a run chooses one member; domains are all composed and then chosen by name."""


def conf_dirs(extra: Path | None = None) -> list[Path]:
    """Return the folders that configuration is read from: the project's, then the user's own.

    Raises:
        ConfigError: The user's folder does not exist, or has a file of the same name as one of the project's, or one
            whose name cannot be written in an override.
    """
    own = Path(str(files("conf")))
    if extra is None:
        return [own]
    if not extra.is_dir():
        raise ConfigError(f"--conf {extra}: no such folder")
    for path in sorted(extra.glob("*/*.yaml")):
        name = path.relative_to(extra)
        if (own / name).exists():
            raise ConfigError(f"{path}: the project has a {name} too; choose another name")
        if not NAME.fullmatch(path.stem):
            raise ConfigError(f"{path}: a name is made of letters, digits, - and _, and starts with a letter")
    return [own, extra]


def list_members(group: str, extra: Path | None = None) -> list[str]:
    """List the members of a configuration group.

    >>> "code" in list_members("domain")
    True
    """
    return sorted({path.stem for root in conf_dirs(extra) for path in (root / group).glob("*.yaml")})


def compose(overrides: Sequence[str], extra: Path | None = None) -> Run:
    """Compose and check a run.

    Args:
        overrides: `KEY=VALUE` settings in Hydra's grammar, later ones winning.
        extra: A folder of the user's own configuration, beside the project's.

    Raises:
        ConfigError: An override is malformed or unknown, or a value is not allowed.
    """
    overrides = [text for text in overrides if text != "experiment=null"]  # the default; Hydra takes it for a name
    check_overrides(overrides, extra)
    return check_run(compose_plain(overrides, extra), extra)


def compose_plain(overrides: Sequence[str], extra: Path | None = None) -> dict[str, Any]:
    """Compose the YAML of a run into plain data, with every domain under `domains`.

    What Hydra reads and merges depends on the chosen members of groups alone, and is kept: values are set on a copy.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parsed = hydra_parse(overrides)
    chosen = tuple(item.input_line for item in parsed if is_choice(item))
    values = [item for item in parsed if not is_choice(item)]
    try:
        config = copy.deepcopy(compose_groups(chosen, extra, written_by(extra)))
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error) or str(error.__cause__)
        raise ConfigError(" ".join(reason.split())) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from error
    return plain


def is_choice(override: Any) -> bool:
    """Say whether an override chooses a member of a group, or is about Hydra itself, rather than sets a value."""
    key = override.key_or_group
    return bool(override.package) or key in (*GROUPS, "domain", "table") or key.startswith("hydra")


@lru_cache
def compose_groups(chosen: tuple[str, ...], extra: Path | None, written: tuple[tuple[Path, int], ...]) -> Any:
    """Compose the chosen members of groups; `written` makes it anew when a user's file has changed meanwhile."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    domains = [f"+domain@domains.{name}={name}" for name in list_members("domain", extra)]
    search = [f"hydra.searchpath=[{quote(f'file://{extra.resolve()}')}]"] if extra else []
    with initialize_config_module("conf", version_base="1.3"):
        return hydra_compose("run", overrides=[*domains, *search, *chosen])


def quote(text: str) -> str:
    r"""Quote a string in Hydra's grammar.

    >>> print(quote("it's"))
    'it\'s'
    """
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


@dataclass(frozen=True)
class Override:
    """One parsed override: its key without a leading `+`, and its text."""

    key: str
    text: str


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides, refusing what is malformed and what would be a sweep.

    >>> parse_overrides(["train.lr=1.0e-3"])
    [Override(key='train.lr', text='train.lr=1.0e-3')]
    >>> parse_overrides(["seed=1,2"])
    Traceback (most recent call last):
    mode.checked.ConfigError: seed=1,2: a comma means a sweep: add --sweep, or write seed=[1,2] for a list
    """
    parsed = []
    for text, override in zip(overrides, hydra_parse(overrides), strict=True):
        if override.is_sweep_override():
            key, _, value = text.partition("=")
            raise ConfigError(
                f"{text}: a comma means a sweep: add --sweep, or write {key.lstrip('+')}=[{value}] for a list"
            )
        parsed.append(Override(key=override.key_or_group, text=text))
    return parsed


def hydra_parse(overrides: Sequence[str]) -> list[Any]:
    """Parse overrides with Hydra's own grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    result = []
    for text in overrides:
        if text.startswith("-"):
            raise ConfigError(f"{text}: no such option")
        if text.startswith("="):
            raise ConfigError(f"{text}: not of the form KEY=VALUE: the key is missing")
        try:
            result.append(parser.parse_override(text))
        except HydraException as error:
            raise ConfigError(f"{text}: not of the form KEY=VALUE in Hydra's grammar") from error
    return result


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Expand the commas of a sweep into the product of all choices, the last one varying fastest.

    >>> expand_sweep(["seed=0,1", "train.lr=1e-3"])
    [['seed=0', 'train.lr=1e-3'], ['seed=1', 'train.lr=1e-3']]
    """
    result: list[list[str]] = [[]]
    for text, override in zip(overrides, hydra_parse(overrides), strict=True):
        options = [text]
        if override.is_sweep_override():
            if not override.is_discrete_sweep() or override.value_type.name == "GLOB_CHOICE_SWEEP":
                raise ConfigError(f"{text}: only commas, choice() and range() can be swept")
            options = [f"{text.partition('=')[0]}={value}" for value in override.sweep_string_iterator()]
        result = [[*done, option] for done in result for option in options]
    return result


def check_overrides(overrides: Sequence[str], extra: Path | None) -> None:
    """Answer the common mistakes in one line, before Hydra answers them in many."""
    parsed = parse_overrides(overrides)
    selected = [item.text for item in parsed if item.key in GROUPS]
    for item in parsed:
        value = item.text.partition("=")[2]
        if item.key in GROUPS:
            members = list_members(item.key, extra)
            if value not in members:
                raise ConfigError(f"{item.text}: not one of {', '.join(members)}{nearest(value, members)}")
        elif item.key == "domain":
            raise ConfigError(f"{item.text}: the domains to adapt to are chosen with targets=[{value}]")
    known = settings_known(tuple(selected), extra, written_by(extra))
    groups = {name.rpartition(".")[0] for name in known}
    for item in parsed:
        if item.key not in known and item.key not in GROUPS and item.key not in groups and "=" in item.text:
            raise ConfigError(f"{item.key}: no such setting{nearest(item.key, known)}")


@lru_cache
def settings_known(
    selected: tuple[str, ...], extra: Path | None, written: tuple[tuple[Path, int], ...]
) -> frozenset[str]:
    """Return the names of all settings under the chosen members of groups; `written` as in `compose_groups`."""
    return frozenset(flatten(compose_plain(selected, extra)))


def written_by(extra: Path | None) -> tuple[tuple[Path, int], ...]:
    """Return the files of a user's own configuration, and when they were written."""
    files = sorted(extra.glob("*/*.yaml")) if extra else []
    return tuple((path, path.stat().st_mtime_ns) for path in files)


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
            raise ConfigError(f"domain {name}: not one of {', '.join(known)}{nearest(name, known)}")
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
    """Build a method from its YAML; only classes of this project are ever imported.

    Raises:
        ConfigError: The target is outside the project, missing, or not a method, or a setting is wrong.
    """
    settings = dict(node)
    target = str(settings.pop("_target_", ""))
    if not target.startswith(TRUSTED):
        raise ConfigError(f"method._target_={target}: outside {' and '.join(TRUSTED)}, so it is not run")
    module, _, name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method._target_={target}: no such class ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, MethodSettings)):
        raise ConfigError(f"method._target_={target}: not a method")
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
        return f"{'.'.join(path)}: no such setting{nearest('.'.join(path), siblings)}"
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
    plain["method"] = {"_target_": asked(run)["method"]["_target_"], **plain["method"]}
    return yaml.safe_dump(plain, sort_keys=False)


def from_yaml(text: str) -> Run:
    """Read what `to_yaml` wrote.

    Raises:
        ConfigError: A setting is unknown or not allowed.
    """
    return check_run(yaml.safe_load(text))


def read_group(group: str, name: str, extra: Path | None = None) -> dict[str, Any]:
    """Read one YAML of a group as plain data, without composing it.

    Raises:
        ConfigError: There is no such member, or it is not YAML.
    """
    for root in conf_dirs(extra):
        path = root / group / f"{name}.yaml"
        if path.exists():
            try:
                with path.open(encoding="utf-8") as file:
                    data = yaml.safe_load(file) or {}
            except yaml.YAMLError as error:
                raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from error
            if not isinstance(data, dict):
                raise ConfigError(f"{path}: settings of the form KEY: VALUE are meant")
            return data
    known = list_members(group, extra)
    raise ConfigError(f"{group} {name}: not one of {', '.join(known)}{nearest(name, known)}")
