"""Parse YAML. Text that would take very long to read, or whose content has no end, is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mode.core.errors import ConfigError

MAX_DEPTH = 40
"""Maximum depth of nested lists and mappings."""


MAX_NODES = 100_000
"""Maximum number of values, lists and mappings. An alias counts as all that it stands for."""


class UniqueLoader(yaml.SafeLoader):
    """Loader of plain data that refuses a mapping with the same key twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping as plain data."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str | bytes, place: Path | str) -> Any:
    """Return the content of YAML as plain data.

    >>> parse_yaml("{a: &x [1, 2], b: *x}", "a.yaml")
    {'a': [1, 2], 'b': [1, 2]}

    Args:
        text: The YAML, or the bytes of a file.
        place: Where the YAML is, for messages.

    Raises:
        ConfigError: The text is not UTF-8, is not YAML, has a key twice, is nested too deeply, or its aliases stand for
            too much.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        check_nodes(text, place)
        return yaml.load(text, UniqueLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number or a date that Python cannot hold
        if isinstance(error, ConfigError):
            raise
        reason = str(error).replace('in "<unicode string>", ', "")
        raise ConfigError(f"{place}: not YAML: {' '.join(reason.split())}") from error


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file as plain data.

    Raises:
        ConfigError: `parse_yaml` refuses its content.
    """
    return parse_yaml(path.read_bytes(), path)


def check_nodes(text: str, place: Path | str) -> None:
    """Check the depth and the number of nodes of YAML, without building its content.

    Raises:
        ConfigError: There are too many, or an alias stands for a list or a mapping that contains it.
        yaml.YAMLError: The text is not YAML.
    """
    count = 0
    counts: dict[str | None, int] = {}  # nodes of every complete list or mapping with an anchor
    begun: list[tuple[str | None, int]] = []  # anchors of the open lists and mappings, and `count` before each
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in begun):
                raise ConfigError(f"{place}: the alias *{event.anchor} stands for a part of the file that contains it")
            count += counts.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            if isinstance(event, yaml.CollectionStartEvent):
                begun.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            if anchor is not None:
                counts[anchor] = count - before
        if len(begun) > MAX_DEPTH:
            raise ConfigError(f"{place}: nested more than {MAX_DEPTH} levels deep")
        if count > MAX_NODES:
            raise ConfigError(f"{place}: more than {MAX_NODES:,} values, with every alias written out")
