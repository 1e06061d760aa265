"""Charts of training: losses of the rows of a table, and losses and accuracies of one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mode.charts.chart import Axis, Chart, Panel, Point, Series, Style, make_styles
from mode.records.contents import Point as CurvePoint
from mode.records.record import Record
from mode.report.charts import choose_named, find_method, split_by_targets, write_labels
from mode.tables.compile import RowResult, TableData


def chart_learning(compiled: TableData, records: Mapping[str, Record]) -> Chart | None:
    """Return the chart of training losses of all rows' own stages, as means over seeds; None without training."""
    found: dict[str, tuple[RowResult, list[tuple[float, float]]]] = {}
    for line in compiled.lines:
        if points := average_curve([records[run].outcome.curve for run in line.runs.values()], "loss"):
            found[line.name] = line, points
    if not found:
        return None
    labels = write_labels(compiled)
    first, *others = split_by_targets(compiled).values()
    named = choose_named(compiled if others else first)
    styles = make_styles({name: find_method(compiled, name) for name in named if name in found}, line=True)
    series = [
        Series(
            labels[name] if name in styles else "",
            [Point(x, y) for x, y in points],
            styles.get(name, Style("", "", line=True)),
        )
        for name, (line, points) in found.items()
    ]
    unnamed = len(series) - len(styles)
    note = f"Grey: {unnamed} other rows of the table." if unnamed else ""
    panel = Panel("", Axis("Steps"), Axis("Training loss (nats per token)"), series)
    return Chart(f"{compiled.table.title}: training loss", [panel], names="ends", size=(4.6, 3.2), note=note)


VALIDATION = "validation/"
"""Prefix of validation values in a point of a curve, such as `validation/DOMAIN/loss`."""


RUN_COLOURS = ("blue", "orange", "green", "pink", "amber", "sky")
"""Colours of the lines of one run: training, then validation by domain."""


def chart_run(record: Record) -> Chart | None:
    """Return the chart of loss and accuracy in a run's training, with validation if measured; None without training."""
    curve = record.outcome.curve
    ends = dict.fromkeys(name for point in curve for name in point.values if name.startswith(VALIDATION))
    panels = []
    for key, up in (("loss", "Loss (nats per token)"), ("accuracy", "Accuracy (%)")):
        wanted = {"Training": key}
        wanted |= {
            f"Validation, {name.removeprefix(VALIDATION).removesuffix(f'/{key}')}": name
            for name in ends
            if name.endswith(f"/{key}")
        }
        series = [
            Series(label, [Point(x, y) for x, y in points], Style(colour, "o" if number else "", line=True))
            for number, ((label, name), colour) in enumerate(zip(wanted.items(), RUN_COLOURS, strict=False))
            if (points := average_curve([curve], name))
        ]
        if series:
            panels.append(Panel("", Axis("Steps"), Axis(up), series))
    if not panels:
        return None
    alone = all(len(panel.series) == 1 for panel in panels)
    if alone:
        panels = [Panel("", panel.x, panel.y, list(unname(panel.series))) for panel in panels]
    return Chart(f"Training of run {record.id}", panels, columns=2, size=(2.5, 1.5))


def unname(series: Sequence[Series]) -> Iterator[Series]:
    """Return series without their names."""
    for each in series:
        yield Series("", each.points, each.style)


def average_curve(curves: Sequence[Sequence[CurvePoint]], key: str) -> list[tuple[float, float]]:
    """Return the mean of a quantity over several curves, at their common steps. Accuracy is in per cent.

    >>> first, second = [CurvePoint(1, {"loss": 2.0})], [CurvePoint(1, {"loss": 4.0}), CurvePoint(2, {"loss": 1.0})]
    >>> average_curve([first, second], "loss")
    [(1.0, 3.0)]
    """
    factor = 100.0 if key.endswith("accuracy") else 1.0
    found = [{point.step: point.values[key] for point in curve if key in point.values} for curve in curves]
    shared = [step for step in found[0] if all(step in each for each in found)] if found else []
    return [(float(step), factor * sum(each[step] for each in found) / len(found)) for step in shared]
