"""Groups of configuration: their members, and the YAML of a member."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mode.config.registry import list_registered_folders
from mode.core.errors import ConfigError, suggest

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
"""Names of configuration files that are valid in Hydra's grammar."""


GROUPS = ("backbone", "method", "budget", "track", "experiment")
"""Groups of which a run chooses one member. All domains are composed, and a run chooses them by name."""


def conf_dirs(extra: Path | None = None) -> list[Path]:
    """Return the folders of configuration: the project's, those of installed packages, and the user's own.

    Raises:
        ConfigError: The user's folder does not exist, or a file in another folder than the project's has the name of a
            project file or a name that is not valid in an override.
    """
    own = Path(str(files("conf")))
    if extra is not None and not extra.is_dir():
        raise ConfigError(f"--conf {extra}: no such folder")
    others = [*list_registered_folders(), *([extra] if extra else [])]
    for folder in others:
        for path in sorted(folder.glob("*/*.yaml")):
            name = path.relative_to(folder)
            if (own / name).exists():
                raise ConfigError(f"{path}: the project has a file {name} too; choose another name")
            if not NAME.fullmatch(path.stem):
                raise ConfigError(f"{path}: a name is made of letters, digits, - and _, and starts with a letter")
    return [own, *others]


def list_members(group: str, extra: Path | None = None) -> list[str]:
    """Return the names of the members of a configuration group.

    >>> "code" in list_members("domain")
    True
    """
    return sorted({path.stem for root in conf_dirs(extra) for path in (root / group).glob("*.yaml")})


def list_written(extra: Path | None) -> tuple[tuple[Path, int], ...]:
    """Return the files of a user's own configuration with their modification times in nanoseconds."""
    files = sorted(extra.glob("*/*.yaml")) if extra else []
    return tuple((path, path.stat().st_mtime_ns) for path in files)


def read_group(group: str, name: str, extra: Path | None = None) -> dict[str, Any]:
    """Return the YAML of one member of a group as plain data, without composing it.

    Raises:
        ConfigError: There is no such member, or its file is not YAML with settings.
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
                raise ConfigError(f"{path}: expected settings of the form KEY: VALUE")
            return data
    known = list_members(group, extra)
    raise ConfigError(f"{group} {name}: not one of {', '.join(known)}{suggest(name, known)}")
