"""The page docs/training-options.md, generated from the classes of settings: `python -m mode.config.options`."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MinLen

from mode.config.names import RECORDED
from mode.config.quoting import format_value
from mode.config.run import Evaluate
from mode.config.train import Train

OPENING = """# Training options

Generated from the code by `python -m mode.config.options`. An option is an override on the command line, such as
`train.batch.size=16`, or a key in YAML. A YAML file contains only what differs from these defaults. `mode show config`
prints all settings of a run. Old names are still accepted, also in interpolations by the full name, such as
`${train.batch_size}`; a relative interpolation, such as `${.size}`, needs today's name.
"""


def render_options() -> str:
    """Return the page in Markdown."""
    parts = [OPENING]
    for prefix, cls in (("train", Train), ("evaluate", Evaluate)):
        for name, group in list_groups(cls, prefix):
            rows = "".join(f"| {' | '.join(row)} |\n" for row in list_rows(group, name))
            heading = " | ".join(("option", "default", "values", "meaning", "old name"))
            parts.append(f"\n## {name}\n\n{summarise(group)}\n\n| {heading} |\n|{' --- |' * 5}\n{rows}")
    return "".join(parts)


def list_groups(cls: type, name: str) -> Iterator[tuple[str, type]]:
    """Yield a settings class and the groups in it, with their dotted names."""
    yield name, cls
    for item in fields(cls):
        if is_dataclass(item.default):
            yield from list_groups(type(item.default), f"{name}.{item.name}")


def list_rows(cls: type, prefix: str) -> Iterator[tuple[str, ...]]:
    """Yield a row per setting of a class, without those of its groups: option, default, values, meaning, old name."""
    kinds, meanings = typing.get_type_hints(cls, include_extras=True), read_attributes(cls)
    for item in fields(cls):
        if is_dataclass(item.default):
            continue
        name = f"{prefix}.{item.name}"
        default = "" if item.default is MISSING else f"`{format_value(item.default)}`"
        old = f"`{RECORDED[name]}`" if name in RECORDED else ""
        yield f"`{name}`", default, describe_values(kinds[item.name]), meanings[item.name].replace("|", "\\|"), old


def summarise(cls: type) -> str:
    """Return the text of a class's docstring before its attributes."""
    return (inspect.getdoc(cls) or "").partition("\nAttributes:")[0].strip()


def read_attributes(cls: type) -> dict[str, str]:
    """Return the descriptions in a class's docstring, by attribute."""
    text = inspect.cleandoc((inspect.getdoc(cls) or "").partition("Attributes:\n")[2])
    return {name: " ".join(about.split()) for name, about in re.findall(r"(?ms)^(\w+): (.*?)(?=^\w+: |\Z)", text)}


def describe_values(kind: Any) -> str:
    """Return a description of the values of a type.

    >>> describe_values(typing.Literal["ddp", "fsdp"] | None)
    '`ddp`, `fsdp`, `null`'
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is typing.Annotated:
        bounds = [describe_bound(bound) for extra in inner[1:] for bound in getattr(extra, "metadata", [extra])]
        return f"{describe_values(inner[0])} {' and '.join(bounds)}"
    if origin in (typing.Union, types.UnionType):
        return ", ".join(describe_values(each) for each in inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return f"list of: {describe_values(inner[0])}"
    if origin is tuple:
        return f"list of {len(inner)}: {describe_values(inner[0])}"
    if origin is dict:
        return f"mapping to: {describe_values(inner[1])}"
    return {bool: "`true`, `false`", int: "integer", float: "number", str: "text", type(None): "`null`"}[kind]


def describe_bound(bound: Any) -> str:
    """Return a description of a bound on a value."""
    if isinstance(bound, MinLen):
        return "(not empty)"
    signs = {Gt: ("> ", "gt"), Ge: (">= ", "ge"), Lt: ("< ", "lt"), Le: ("<= ", "le")}
    sign, attribute = signs[type(bound)]
    return f"{sign}{getattr(bound, attribute):g}"


if __name__ == "__main__":
    print(render_options(), end="")
