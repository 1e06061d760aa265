"""Groups of configuration: their members, and the YAML of a member."""

from __future__ import annotations

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from importlib.resources import files
from pathlib import Path
from typing import Any

from mode.config.parse import read_yaml
from mode.config.registry import list_registered_folders
from mode.core.errors import ConfigError, suggest
from mode.core.escape import check_name, is_name
from mode.core.files import find_paths, read_existing

GROUPS = ("backbone", "method", "budget", "track", "experiment")
"""Groups of which a run chooses one member. All domains are composed, and a run chooses them by name."""


def conf_dirs(extra: Path | None = None) -> list[Path]:
    """Return the folders of configuration: the project's, those of installed packages, and the user's own.

    A file of an earlier folder goes before one of the same name in a later folder. A package may repeat a name, since
    the user did not write the package; the user's folder may not.

    Raises:
        ConfigError: The user's folder does not exist, has no file in a group, has a file of the same name as one of
            the project's or of a package's, or one whose name cannot be written in an override.
    """
    earlier = [Path(str(files("conf"))), *list_registered_folders()]
    if extra is None:
        return earlier
    if not extra.is_dir():
        raise ConfigError(f"--conf {extra}: no such folder")
    check_layout(extra, [path.name for path in earlier[0].iterdir() if path.is_dir() and is_name(path.name)])
    for path in find_paths(extra, "*/*.yaml"):
        name = path.relative_to(extra)
        for folder in earlier:
            if (folder / name).exists():
                owner = "the project" if folder == earlier[0] else f"the package {folder.parent.name}"
                raise ConfigError(f"{path}: {owner} has a {name} too; choose another name")
        try:
            check_name(path.stem)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
    return [*earlier, extra]


def check_layout(folder: Path, groups: Iterable[str]) -> None:
    """Refuse a folder of the user's own configuration without a YAML file in a group.

    Raises:
        ConfigError: There is none.
    """
    if not any(next((folder / group).glob("*.yaml"), None) for group in groups):
        found = sorted(path.name for path in folder.glob("*") if path.is_dir())
        near = next((hint for name in found if (hint := suggest(name, groups))), "")
        raise ConfigError(
            f"--conf {folder}: no YAML file in the folder of a group, such as {folder}/domain/NAME.yaml{near}"
        )


def list_members(group: str, extra: Path | None = None) -> list[str]:
    """List the members of a configuration group. A package's file whose name Hydra cannot express is left out.

    >>> "code" in list_members("domain")
    True
    """
    _, *others = [[path.stem for path in (root / group).glob("*.yaml")] for root in conf_dirs(extra)]
    return sorted({*list_own_members(group), *(name for names in others for name in names if is_name(name))})


def list_own_members(group: str) -> list[str]:
    """List the members of a configuration group that are part of this project."""
    return [path.stem for path in (conf_dirs()[0] / group).glob("*.yaml")]


def list_written(extra: Path | None) -> tuple[tuple[Path, int], ...]:
    """Return the files of a user's own configuration with their modification times in nanoseconds."""
    files = find_paths(extra, "*/*.yaml") if extra else []
    return tuple(read_existing(files, lambda path: (path, path.stat().st_mtime_ns)))


def find_circle(extra: Path | None) -> list[Path]:
    """Return files of a user's own configuration whose `defaults` name each other in a circle; empty if none do."""
    paths = find_paths(extra, "*/*.yaml") if extra else []
    files = {f"{path.parent.name}/{path.stem}": path for path in paths}
    named = {key: list_defaults(path.parent.name, path) for key, path in files.items()}
    try:
        TopologicalSorter(named).prepare()
    except CycleError as error:
        return [files[key] for key in error.args[1]]
    return []


def list_defaults(group: str, path: Path) -> list[str]:
    """Return the files that a YAML file names in `defaults`, as GROUP/NAME."""
    data = read_yaml(path)
    found = []
    for item in data.get("defaults") or [] if isinstance(data, dict) else []:
        for key, value in item.items() if isinstance(item, dict) else [(group, item)]:
            inner = str(key).removeprefix("override ").partition("@")[0].strip()
            folder = inner.lstrip("/") if inner.startswith("/") or inner == group else f"{group}/{inner}"
            found.append(f"/{value}" if str(value).startswith("/") else f"{folder}/{value}")
    return [key.lstrip("/") for key in found]


def read_group(group: str, name: str, extra: Path | None = None) -> dict[str, Any]:
    """Return the YAML of one member of a group as plain data, without composing it.

    Raises:
        ConfigError: There is no such member, or its file is not YAML with settings.
    """
    return read_settings(find_member(group, name, extra))


def find_member(group: str, name: str, extra: Path | None = None) -> Path:
    """Return the file of one member of a group.

    Raises:
        ConfigError: There is no such member.
    """
    known = list_members(group, extra)
    if name not in known:
        raise ConfigError(f"{group} {name}: not one of {', '.join(known)}{suggest(name, known)}")
    paths = (root / group / f"{name}.yaml" for root in conf_dirs(extra))
    return next(path for path in paths if path.exists())


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        ConfigError: The file is not UTF-8 text, not YAML, or holds no settings.
    """
    data = read_yaml(path) or {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected settings of the form KEY: VALUE")
    return data
