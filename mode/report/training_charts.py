"""Charts of training: losses of the rows of a table, and losses and accuracies of one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mode.charts.chart import Axis, Chart, Panel, Point, Series, Style
from mode.records.contents import Point as CurvePoint
from mode.records.record import Record
from mode.report.charts import head_group, label_groups, split_by_targets, style_group
from mode.tables.compile import TableData


def chart_learning(compiled: TableData, records: Mapping[str, Record]) -> Chart | None:
    """Return the chart of training losses of all rows' own stages, as means over seeds; None without training.

    Rows with different targets have different losses: every set of targets with several rows has a panel of its own.
    """
    curves = {
        line.name: points
        for line in compiled.lines
        if (points := average_curve([records[run].outcome.curve for run in line.runs.values()], "loss"))
    }
    if not curves:
        return None
    groups = split_by_targets(compiled)
    labels, shared = label_groups(compiled, groups, line=True)
    panels = []
    unnamed = 0
    for title, group in groups.items():
        names = [line.name for line in group.lines if line.name in curves]
        styles = style_group(group, labels, title, shared and len(groups) > 1, line=True)
        series = [draw_curve(labels[title, name], curves[name], styles) for name in names]
        unnamed += sum(not each.label for each in series)
        if series:
            heading = head_group(title) if len(groups) > 1 else ""
            panels.append(Panel(heading, Axis("Steps"), Axis("Training loss (nats per token)"), series))
    note = f"Grey: {unnamed} other rows of the table." if unnamed else ""
    title = f"{compiled.table.title}: training loss"
    if shared and len(panels) > 1:
        return Chart(title, panels, columns=3, size=(2.4, 2.0), note=note)
    return Chart(title, panels, names="ends", size=(4.6, 3.2), note=note)


def draw_curve(label: str, points: Sequence[tuple[float, float]], styles: Mapping[str, Style]) -> Series:
    """Return the line of a row's training losses, grey and unnamed without a style."""
    named = label if label in styles else ""
    return Series(named, [Point(x, y) for x, y in points], styles.get(label, Style("", "", line=True)))


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
