"""Find the class of a method, in this project or in an installed package that registers it.

Only modules of this project, under `mode.` and `baselines.`, are imported to look for the class that a configuration
names. A module of another package is imported only if the installed package registers it through the entry-point group
`mode.methods`. The YAML of a package is in a folder `conf` of the package, with the layout of this project's `conf`. A
package replaces no method of this project.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TypeGuard

from mode.config.run import MethodSettings
from mode.core.errors import ConfigError

TRUSTED = ("mode.", "baselines.")
"""Prefixes of import paths in this project."""


ENTRY_POINTS = "mode.methods"
"""Entry-point group of methods."""


@lru_cache
def list_registered() -> tuple[EntryPoint, ...]:
    """Return the entry points of methods in installed packages, without importing the methods."""
    return tuple(entry_points(group=ENTRY_POINTS))


@lru_cache
def list_registered_folders() -> tuple[Path, ...]:
    """Return the folders of configuration in packages with registered methods."""
    packages = dict.fromkeys(point.module.partition(".")[0] for point in list_registered())
    found = [find_spec(package) for package in packages]
    roots = [Path(root) for spec in found if spec for root in spec.submodule_search_locations or ()]
    return tuple(root / "conf" for root in roots if (root / "conf").is_dir())


def find_method(target: str) -> type[MethodSettings]:
    """Return the class of a method by its import path, its entry point, or its name in records.

    Raises:
        ConfigError: The class is neither in this project nor registered, cannot be imported, or is not a method; or a
            package's class has the name in records of another method.
    """
    if not target:
        raise ConfigError("method._target_: this setting is missing")
    found: object = None
    reason = f"not in {' or '.join(TRUSTED)}, and no installed package registers it as an entry point of {ENTRY_POINTS}"
    try:
        found = import_target(target)
    except (Exception, SystemExit) as error:  # a registered package may fail in any way
        about = "the import ends the program" if isinstance(error, SystemExit) else " ".join(str(error).split())
        reason = f"cannot be imported ({about or type(error).__name__})"
    found = found or next(iter(list_recorded_methods().get(target, ())), None)
    if found is None:
        raise ConfigError(f"method._target_={target}: {reason}")
    if not is_method(found):
        raise ConfigError(f"method._target_={target}: not a method")
    if not is_own(found):
        check_recorded_name(target, found)
    return found


def check_recorded_name(target: str, found: type[MethodSettings]) -> None:
    """Refuse a method of a package that has the name in records of another method.

    Raises:
        ConfigError: There is another.
    """
    name = found.recorded_name()
    for other in list_recorded_methods().get(name, ()):
        if other is not found:
            raise ConfigError(
                f"method._target_={target}: recorded_as={name} is the name in records of "
                f"{other.__module__}.{other.__qualname__} too; give one of them another"
            )


@lru_cache
def list_recorded_methods() -> dict[str, list[type[MethodSettings]]]:
    """Return the methods by their names in records, this project's first. Methods that fail to import are left out."""
    from mode.config.groups import list_members, read_group

    classes: dict[type[MethodSettings], None] = {}
    for name in list_members("method"):
        with suppress(Exception, SystemExit):  # reported only to a user who chooses this method
            found = import_target(str(read_group("method", name)["_target_"]))
            if is_method(found):
                classes[found] = None
    named: dict[str, list[type[MethodSettings]]] = {}
    for found in sorted(classes, key=is_own, reverse=True):
        named.setdefault(found.recorded_name(), []).append(found)
    return named


def is_own(cls: type) -> bool:
    """Say whether a class is this project's."""
    return cls.__module__.startswith(TRUSTED)


def import_target(target: str) -> object | None:
    """Return the object of an import path or an entry point; None if it is neither in this project nor registered."""
    module, _, name = target.rpartition(".")
    if target.startswith(TRUSTED):
        found: object = getattr(importlib.import_module(module), name)
        return found
    point = next((each for each in list_registered() if target in (each.name, each.value.replace(":", "."))), None)
    return point.load() if point else None


def is_method(found: object) -> TypeGuard[type[MethodSettings]]:
    """Return whether an imported object is the class of a method."""
    return isinstance(found, type) and issubclass(found, MethodSettings)
