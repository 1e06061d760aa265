"""Compose a run from YAML and overrides. Only this module imports Hydra and OmegaConf."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from mode.config.check import check_run, fill_defaults, flatten
from mode.config.groups import (
    GROUPS,
    conf_dirs,
    find_circle,
    find_member,
    list_members,
    list_own_members,
    list_written,
)
from mode.config.names import (
    check_spellings,
    rename_references,
    rename_setting,
    rename_settings,
    suggest_setting,
)
from mode.config.parse import MAX_DEPTH, read_yaml
from mode.config.quoting import format_value, quote
from mode.config.run import Run
from mode.core.errors import ConfigError, suggest
from mode.core.escape import BREAKS, shorten

MOST_RUNS = 10_000
"""Maximum number of runs of a sweep. A range without an end has more."""


def compose(overrides: Sequence[str], extra: Path | None = None) -> Run:
    """Compose and check a run.

    Args:
        overrides: `KEY=VALUE` settings in Hydra's grammar. Later settings take precedence.
        extra: A folder of the user's own configuration, in addition to the project's.

    Raises:
        ConfigError: An override is malformed or unknown, or a value is not allowed.
    """
    overrides = [text for text in overrides if text != "experiment=null"]  # the default; Hydra reads null as a name
    overrides = rename_overrides(overrides)
    check_overrides(overrides, extra)
    return check_run(compose_plain(overrides, extra), extra)


def compose_plain(overrides: Sequence[str], extra: Path | None = None) -> dict[str, Any]:
    """Return a run as plain data: its YAML with defaults filled in, and every domain in `domains`.

    The result of Hydra depends only on the chosen members of groups, so it is cached. Values are set on a copy.

    Args:
        overrides: `KEY=VALUE` settings by today's names.
        extra: A folder of the user's own configuration.

    Raises:
        ConfigError: Hydra cannot compose the settings, or a file cannot be read.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parsed = parse_with_hydra(overrides)
    chosen = tuple(item.input_line for item in parsed if is_choice(item))
    values = [item for item in parsed if not is_choice(item)]
    try:
        composed, broken = copy.deepcopy(compose_groups(chosen, extra, list_written(extra)))
        ConfigLoaderImpl._apply_overrides_to_config(values, composed)
        broken |= remove_unresolved(composed, extra)
        plain: dict[str, Any] = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(join_reason(error)) from error
    except RecursionError as error:
        raise ConfigError(explain_recursion(extra)) from error
    return plain | {"domains": plain["domains"] | broken} if broken else plain


def explain_recursion(extra: Path | None) -> str:
    """Return why composing does not end: `defaults` that name each other in a circle, or settings nested too deeply."""
    circle = find_circle(extra)
    return f"{circle[0]}: its `defaults` lead back to it" if circle else "the settings are nested too deeply"


def join_reason(error: Exception) -> str:
    """Return the message of a library's error in one line."""
    return " ".join((str(error) or str(error.__cause__)).split())


def remove_unresolved(config: Any, extra: Path | None) -> dict[str, ConfigError]:
    """Remove the domains with a missing value or a wrong interpolation, and return an error for each by name."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    broken = {}
    for name in config.domains:
        try:
            if OmegaConf.is_config(config.domains._get_node(name)):
                OmegaConf.to_container(config.domains[name], resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            broken[name] = ConfigError(f"{find_member('domain', name, extra)}: {join_reason(error)}")
    OmegaConf.set_struct(config.domains, False)
    for name in broken:
        del config.domains[name]
    return broken


def is_choice(override: Any) -> bool:
    """Return whether an override chooses a member of a group or configures Hydra, instead of setting a value."""
    key = override.key_or_group
    return bool(override.package) or key in (*GROUPS, "domain", "table") or key.startswith("hydra")


@lru_cache
def compose_groups(
    chosen: tuple[str, ...], extra: Path | None, written: tuple[tuple[Path, int], ...]
) -> tuple[Any, dict[str, ConfigError]]:
    """Compose the chosen members of groups, with defaults, and every domain whose file can be read.

    Args:
        chosen: The overrides that choose members.
        extra: A folder of the user's own configuration.
        written: The user's files with their times. They renew the cache when a file changes.

    Returns:
        The configuration, and the errors of the domains that it lacks, by name.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from omegaconf import OmegaConf

    names = list_members("domain", extra)
    scheme = register_source()
    others = ",".join(quote(f"{scheme}://{folder.resolve()}") for folder in conf_dirs(extra)[1:])
    search = [f"hydra.searchpath=[{others}]"] if others else []

    def compose_with(domains: Iterable[str], *choices: str) -> Any:
        with initialize_config_module("conf", version_base="1.3"):
            added = [f"+domain@domains.{name}={name}" for name in domains]
            return hydra_compose("run", overrides=[*added, *search, *choices])

    broken: dict[str, ConfigError] = {}
    try:
        config = compose_with(names, *chosen)
    except Exception:  # a file may be broken in any way
        for name in set(names) - set(list_own_members("domain")):
            try:
                compose_with([name])
            except Exception as error:
                broken[name] = explain_domain(name, error, extra)
        try:
            config = compose_with([name for name in names if name not in broken], *chosen)
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:  # such as `defaults: {}`
            if isinstance(error, ConfigError):
                raise
            reason = join_reason(error).removeprefix("None") or type(error).__name__
            raise ConfigError(f"{' '.join(chosen)}: a file that Hydra cannot compose: {reason}") from error
    plain: Any = OmegaConf.to_container(config, resolve=False)
    filled = OmegaConf.create(fill_defaults(rename_settings(plain)))
    OmegaConf.set_struct(filled, True)
    return filled, broken


def explain_domain(name: str, error: Exception, extra: Path | None) -> ConfigError:
    """Return the error about a domain that cannot be composed. It names the domain's file."""
    path, reason = find_member("domain", name, extra), join_reason(error)
    if isinstance(error, RecursionError):
        return ConfigError(explain_recursion(extra))
    return ConfigError(reason if reason.startswith(str(path)) else f"{path}: {reason}")


@lru_cache
def register_source() -> str:
    """Let Hydra read YAML with old names of settings, and return the scheme of addresses of such folders.

    Old names are renamed file by file, before Hydra merges the files: of two files, the later one wins by either name.
    """
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.plugins.config_source import ConfigResult
    from omegaconf import DictConfig, ListConfig, OmegaConf

    class RenamingSource(FileConfigSource):  # type: ignore[misc]
        """A folder of configuration that a package or the user wrote."""

        @staticmethod
        def scheme() -> str:
            return "renamed"

        def load_config(self, config_path: str) -> ConfigResult:
            path = Path(self.path, self._normalize_file_name(config_path))
            if path.is_file():
                read_yaml(path)
            result = super().load_config(config_path)
            if isinstance(result.config, ListConfig):
                raise ConfigError(f"{path}: expected settings of the form KEY: VALUE")
            if isinstance(result.config, DictConfig):
                package = result.header.get("package") or config_path.rpartition("/")[0].replace("/", ".")
                plain: Any = OmegaConf.to_container(result.config, resolve=False)
                prefix = "" if package == "_global_" else f"{package}."
                result.config = OmegaConf.create(rename_settings(rename_references(plain), prefix))
            return result

    SourcesRegistry.instance().register(RenamingSource)
    return RenamingSource.scheme()


def suggest_quotes(text: str) -> str:
    """Return a hint with the quoted form of an override, as one types it in a shell; empty if no quotes help.

    >>> print(suggest_quotes("paths.runs=~/x"))
    ; if it is text, quote it: 'paths.runs="~/x"'
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, sign, value = text.partition("=")
    if not sign or BREAKS.search(text) or "${" in value or len(text) > 400:  # ${ is a reference in quotes too
        return ""
    quoted = f"{key}={quote(value, chr(34))}"
    try:
        same = OverridesParser.create().parse_override(quoted).value() == value
    except HydraException:
        return ""
    return f"; if it is text, quote it: {shlex.quote(quoted)}" if same else ""


@dataclass(frozen=True)
class Override:
    """One parsed override.

    Attributes:
        key: Name of the setting today, without a leading `+`.
        value: Value of the setting; None for a deletion.
        text: The override as the user wrote it.
    """

    key: str
    value: Any
    text: str


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides.

    >>> parse_overrides(["train.lr=1.0e-3"])
    [Override(key='train.lr', value=0.001, text='train.lr=1.0e-3')]
    >>> parse_overrides(["seed=1,2"])
    Traceback (most recent call last):
    mode.core.errors.ConfigError: seed=1,2: a comma means a sweep: add --sweep, or write seed=[1,2] for a list

    Raises:
        ConfigError: An override is malformed, or has a comma, as in a sweep.
    """
    parsed = []
    for text, override in zip(overrides, parse_with_hydra(overrides), strict=True):
        if override.is_sweep_override():
            key, _, value = text.partition("=")
            raise ConfigError(
                f"{text}: a comma means a sweep: add --sweep, or write {key.lstrip('+')}=[{value}] for a list"
            )
        key, value = rename_setting(override.key_or_group, None if override.is_delete() else override.value())
        parsed.append(Override(key=key, value=value, text=text))
    return parsed


def rename_overrides(overrides: Sequence[str]) -> list[str]:
    """Return overrides with old names and values replaced by today's.

    >>> rename_overrides(["++train.batch_size=4", "train.documents=apart", "seed=1"])
    ['++train.batch.size=4', 'train.batch.intra_document_masking=true', 'seed=1']

    Raises:
        ConfigError: One setting has different values under its old and its new name, or an override is malformed.
    """
    overrides = [rename_references(text) for text in overrides]
    renamed: list[str] = []
    given: dict[str, Any] = {}
    for item, override in zip(parse_overrides(overrides), parse_with_hydra(overrides), strict=True):
        written = override.key_or_group
        value = None if override.is_delete() else override.value()
        given |= flatten({written: value})
        text = item.text.replace(written, item.key, 1)
        renamed.append(text if item.value == value else f"{text.partition('=')[0]}={format_value(item.value)}")
    check_spellings(given)
    return renamed


def parse_with_hydra(overrides: Sequence[str]) -> list[Any]:
    """Return Hydra's own representation of every override."""
    return [parse_text(text) for text in overrides]


@lru_cache(maxsize=4096)
def parse_text(text: str) -> Any:
    """Return Hydra's own representation of one override.

    Raises:
        ConfigError: The override is not of the form KEY=VALUE, or is nested too deeply.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if text.startswith("-"):
        raise ConfigError(f"{text}: no such option")
    if text.startswith("="):
        raise ConfigError(f"{text}: not of the form KEY=VALUE: the key is missing")
    if max(accumulate((sign in "[{(") - (sign in ")}]") for sign in text), default=0) > MAX_DEPTH:
        raise ConfigError(f"{text[:40]}...: nested more than {MAX_DEPTH} levels deep")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        where = shorten(text)
        raise ConfigError(f"{where}: not of the form KEY=VALUE in Hydra's grammar{suggest_quotes(text)}") from error
    except (ValueError, RecursionError) as error:  # an integer of more than 4,300 digits, or too many brackets
        raise ConfigError(f"{shorten(text)}: a value that cannot be read: {error}") from error


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every run of a sweep: the product of all choices. The last choice varies fastest.

    >>> expand_sweep(["seed=0,1", "train.lr=1e-3"])
    [['seed=0', 'train.lr=1e-3'], ['seed=1', 'train.lr=1e-3']]

    Raises:
        ConfigError: An override has a sweep other than commas, choice() and range(), or one without values or without
            an end.
    """
    from hydra.errors import HydraException

    result: list[list[str]] = [[]]
    for text, override in zip(overrides, parse_with_hydra(overrides), strict=True):
        options = [text]
        if override.is_sweep_override():
            if not override.is_discrete_sweep() or override.value_type.name == "GLOB_CHOICE_SWEEP":
                raise ConfigError(f"{text}: only commas, choice() and range() can be swept")
            try:
                values = list(islice(override.sweep_string_iterator(), MOST_RUNS + 1))
            except (ValueError, ArithmeticError, HydraException) as error:  # such as a step of 0
                raise ConfigError(f"{text}: not a range with an end: {join_reason(error)}") from error
            if not values:
                raise ConfigError(f"{text}: the sweep has no value")
            options = [f"{text.partition('=')[0]}={value}" for value in values]
        if len(result) * len(options) > MOST_RUNS:
            raise ConfigError(f"{text}: the sweep has more than {MOST_RUNS:,} runs")
        result = [[*done, option] for done in result for option in options]
    return result


def check_overrides(overrides: Sequence[str], extra: Path | None) -> None:
    """Report common mistakes in one line, before Hydra reports them in many.

    Raises:
        ConfigError: A member of a group or a setting does not exist, or `domain=` is used in place of `targets=`.
    """
    parsed = parse_overrides(overrides)
    selected = [item.text for item in parsed if item.key in GROUPS]
    for item in parsed:
        value = item.text.partition("=")[2]
        if item.key in GROUPS:
            members = list_members(item.key, extra)
            if value not in members:
                raise ConfigError(f"{item.text}: not one of {', '.join(members)}{suggest(value, members)}")
        elif item.key == "domain":
            raise ConfigError(f"{item.text}: the domains to adapt to are chosen with targets=[{value}]")
    known = list_settings(tuple(selected), extra, list_written(extra))
    groups = {name.rpartition(".")[0] for name in known}
    for item in parsed:
        if item.key not in known and item.key not in GROUPS and item.key not in groups and "=" in item.text:
            raise ConfigError(f"{item.key}: no such setting{suggest_setting(item.key, known)}")


@lru_cache
def list_settings(
    selected: tuple[str, ...], extra: Path | None, written: tuple[tuple[Path, int], ...]
) -> frozenset[str]:
    """Return the names of all settings for the chosen members of groups. `written` is as in `compose_groups`."""
    return frozenset(flatten(compose_plain(selected, extra)))
