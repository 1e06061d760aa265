"""The table of methods, and the description of one method, as text of a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mode.backbone.shape import read_shape
from mode.config.check import flatten
from mode.config.compose import compose
from mode.config.groups import list_members
from mode.config.quoting import format_value
from mode.config.run import MethodSettings, Run
from mode.core.errors import ConfigError
from mode.cost.flops import compute_untouched_cost
from mode.methods.base import FAMILIES, Method, count_generation

WIDTH = 80
HEADS = ("method", "trained", "active", "passes", "old text", "source")


@dataclass(frozen=True)
class MethodRow:
    """A method in the table.

    Attributes:
        name: Name of its YAML file.
        family: Family of the method.
        source: Publication; empty if not stated.
        trained: Most parameters that a stage trains; None if unknown.
        active: Most parameters that the prediction of a token uses; None if unknown.
        passes: Operations of predicting a token, divided by those of the backbone; None if unknown.
        old_text: Sources of rows that keep what the backbone knows.
        problem: Why the method cannot be used with these settings; None if it can.
    """

    name: str
    family: str = Method.family
    source: str = ""
    trained: int | None = None
    active: int | None = None
    passes: float | None = None
    old_text: tuple[str, ...] = ()
    problem: str | None = None


def render_methods(overrides: Sequence[str], extra: Path | None) -> str:
    """Return the table of all methods by family.

    Args:
        overrides: Settings other than those of a method.
        extra: Folder of the user's own configuration.

    Raises:
        ConfigError: A setting is wrong or is one of a method, or the backbone cannot be read.
    """
    for text in overrides:
        if text.lstrip("+~").partition("=")[0].startswith("method."):
            raise ConfigError(f"{text}: settings of one method go with --describe NAME")
    refuse_method(overrides)
    run = compose(overrides, extra)
    size = read_shape(run.backbone).parameters
    rows = [summarize_method(name, overrides, extra) for name in list_members("method", extra)]
    note = (
        f"Parameters in millions, on backbone {run.backbone.name} ({format_millions(size)}) with targets "
        f"{', '.join(run.targets)}. Trained: in the largest stage. Active: those that the prediction of a token uses. "
        "Passes: operations per generated token, divided by the backbone's. Old text: rows in training that keep what "
        "the backbone knows; self: rows that the backbone writes. `mode show methods --describe NAME` shows the "
        "settings of a method."
    )
    return "\n".join([*layout_rows(rows), "", *textwrap.wrap(note, WIDTH)])


def refuse_method(overrides: Sequence[str]) -> None:
    """Refuse an override that chooses a method.

    Raises:
        ConfigError: There is one.
    """
    for text in overrides:
        key, _, name = text.lstrip("+~").partition("=")
        if key == "method":
            raise ConfigError(f"{text}: `mode show methods` shows every method, and one with --describe {name}")


def summarize_method(name: str, overrides: Sequence[str], extra: Path | None) -> MethodRow:
    """Return the row of a method. A method that cannot be used has a row with the reason."""
    try:
        run = compose([*overrides, f"method={name}"], extra)
    except ConfigError as error:
        return MethodRow(name, problem=str(error))
    family, source = find_origin(run.method)
    try:
        costs = measure_method(run)
    except ConfigError as error:
        return MethodRow(name, family, source, problem=str(error))
    return MethodRow(name, family, source, *costs)


def find_origin(method: MethodSettings) -> tuple[str, str]:
    """Return the family and the publication of a method."""
    return (method.family, method.source) if isinstance(method, Method) else (Method.family, "")


def measure_method(run: Run) -> tuple[int | None, int | None, float | None, tuple[str, ...]]:
    """Return trained and active parameters, passes per token, and the sources of old text, over all stages of a run.

    Raises:
        ConfigError: The settings do not fit the backbone.
    """
    from mode.launch.table_runs import list_stages

    stages = [(stage, stage.method) for stage in list_stages(run) if isinstance(stage.method, Method)]
    costs = [method.cost(stage) for stage, method in stages]
    trained = [None if cost is None else cost.trainable for cost in costs]
    known = [count for count in trained if count is not None]
    most = max(known) if known and len(known) == len(trained) else None
    active = costs[-1].active if costs and costs[-1] is not None else None
    generation = count_generation(run)
    untouched = compute_untouched_cost(read_shape(run.backbone), run.train.sequence_length).flops.forward
    passes = None if generation is None else generation / untouched
    training = [item for item, count in zip(stages, trained, strict=True) if count != 0]
    old_text = dict.fromkeys(name for stage, method in training for name in method.old_text(stage))
    return most, active, passes, tuple(old_text)


def layout_rows(rows: Sequence[MethodRow]) -> list[str]:
    """Return the lines of the table, under a heading for every family."""
    cells = {row.name: format_row(row) for row in rows if row.problem is None}
    named = [(f"  {row.name}", *("",) * (len(HEADS) - 1)) for row in rows]
    widths = [max(len(line[column]) for line in [HEADS, *cells.values(), *named]) for column in range(len(HEADS))]
    lines = [join_cells(HEADS, widths)]
    others = sorted({row.family for row in rows} - {*FAMILIES, Method.family})
    for family in (*FAMILIES, *others, Method.family):
        members = [row for row in rows if row.family == family]
        lines += [family] if members else []
        for row in members:
            problem = f"  {row.name:<{widths[0] - 2}}  cannot be used: {row.problem}"
            lines.append(join_cells(cells[row.name], widths) if row.name in cells else problem)
    return lines


def format_row(row: MethodRow) -> tuple[str, ...]:
    """Return the cells of a method; dashes where nothing is known."""
    return (
        f"  {row.name}",
        format_millions(row.trained),
        format_millions(row.active),
        "–" if row.passes is None else f"{row.passes:.2f}",
        ", ".join(row.old_text) or "no",
        row.source or "–",
    )


def format_millions(count: int | None) -> str:
    """Return a number of parameters in millions; a dash if it is unknown.

    >>> format_millions(2_397_760), format_millions(1_711_376_384), format_millions(None)
    ('2.398', '1,711', '–')
    """
    if count is None:
        return "–"
    return f"{count / 1e6:,.0f}" if count >= 1e9 else f"{count / 1e6:.3f}"


def join_cells(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return a line of the table. Numbers are aligned to the right.

    >>> join_cells(("lora", "1", "2", "3", "no", "a paper"), (5, 2, 2, 2, 4, 9))
    'lora    1   2   3  no    a paper'
    """
    padded = zip(cells, widths, strict=True)
    return "  ".join(
        f"{cell:>{width}}" if 0 < column < 4 else f"{cell:<{width}}" for column, (cell, width) in enumerate(padded)
    ).rstrip()


def render_method(name: str, overrides: Sequence[str], extra: Path | None) -> str:
    """Return the description of one method: its family, its publication and its settings.

    Args:
        name: Name of the method's YAML file.
        overrides: Settings of the run.
        extra: Folder of the user's own configuration.

    Raises:
        ConfigError: There is no such method, or a setting is wrong.
    """
    refuse_method(overrides)
    method = compose([*overrides, f"method={name}"], extra).method
    family, source = find_origin(method)
    about = (type(method).__doc__ or "").strip().partition("\n")[0]
    settings = [f"  method.{key}={format_value(value)}" for key, value in flatten(asdict(method)).items()]
    return "\n".join([f"{name}: {about}", f"family: {family}", f"source: {source or '–'}", "settings:", *settings])
