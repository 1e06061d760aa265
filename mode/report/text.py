"""Tables as Markdown, LaTeX and CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from mode.core.escape import escape_html, escape_latex, escape_markdown
from mode.records.metrics import ACCURACY, Metric
from mode.report.frames import (
    CONTAMINATION_NOTE,
    COST_NOTE,
    FRONTIER_NOTE,
    ROUTING_NOTE,
    make_contamination_frame,
    make_cost_frame,
    make_frame,
    make_frontier_frame,
    make_interval_frame,
    make_published_frame,
    make_routing_frame,
)
from mode.tables.columns import AVERAGE, RETENTION, TARGET, Column
from mode.tables.compile import TableData
from mode.tables.findings import list_findings
from mode.tables.frontier import LOSSES, correlate_divergence, get_mean, list_frontiers
from mode.tables.statistics import FEW, FEWEST, correct_holm


def render_markdown(compiled: TableData) -> str:
    """Return a compiled table in Markdown, with its notes and the published values."""
    parts = [f"# {escape_markdown(compiled.table.title)}", "", align_frame(make_frame(compiled, strong="**{}**"))]
    parts += ["", *write_notes(compiled)]
    parts += [line for sentence in list_findings(compiled) for line in ("", f"- {escape_html(sentence)}")]
    if compiled.table.differences:
        parts += ["", "95 % intervals of the differences over documents:", ""]
        parts += [align_frame(make_interval_frame(compiled))]
    if (frontiers := make_frontier_frame(compiled, strong="**{}**")) is not None:
        parts += ["", FRONTIER_NOTE, "", align_frame(frontiers)]
    parts += ["", COST_NOTE, "", align_frame(make_cost_frame(compiled))]
    parts += [line for sentence in describe_divergence(compiled) for line in ("", sentence)]
    if compiled.contamination:
        parts += ["", CONTAMINATION_NOTE, "", align_frame(make_contamination_frame(compiled))]
    if (routed := make_routing_frame(compiled)) is not None:
        parts += ["", ROUTING_NOTE, "", align_frame(routed)]
    published = make_published_frame(compiled)
    if published is not None and compiled.table.published is not None:
        source = compiled.table.published
        parts += ["", f"Published: {escape_html(source.source)}"]
        parts += ["", align_frame(published)] if len(published) else []  # a publication without values has only a note
        parts += ["", escape_html(source.note)] if source.note else []
    return "\n".join(parts).rstrip() + "\n"


def align_frame(table: pd.DataFrame) -> str:
    r"""Return a frame of text cells in Markdown. The first column is plain text, to the left; others to the right.

    >>> print(align_frame(pd.DataFrame({"Method": ["a|b"], "Code": ["**1**"]})))
    | Method   |   Code |
    |:---------|-------:|
    | a\|b     |  **1** |
    """
    # Number parsing is off: it would turn 12.30 into 12.3 and +1.50 into 1.5.
    first, *others = table.columns
    sides = ["left", *["right"] * len(others)]
    cells = table.assign(**{first: table[first].map(escape_markdown)})
    return str(cells.rename(columns=escape_markdown).to_markdown(index=False, disable_numparse=True, colalign=sides))


def describe_divergence(compiled: TableData) -> list[str]:
    """Return a sentence on how divergence from the backbone goes with retention; empty without enough records."""
    found = correlate_divergence(compiled)
    if found is None:
        return []
    alone = correlate_divergence(compiled, gated=False)
    rest = "" if alone in (None, found) else f", {alone[0]:+.2f} over the {alone[1]} without experts or several models"
    return [
        f"KL to the backbone on the targets' validation text, and retention: rank correlation {found[0]:+.2f} "
        f"(Spearman) over {found[1]} rows{rest}."
    ]


def describe_scored(compiled: TableData) -> str:
    """Return what a table's rows are scored on: a split, or some tokens of it (`evaluate.tokens`)."""
    found = (run.evaluate.tokens for run in compiled.settings.values())
    tokens = {number for number in found if number is not None}
    if not tokens:
        return f"the whole {compiled.split} split"
    count = " or ".join(f"{number:,}" for number in sorted(tokens))
    return f"{count} tokens per domain of the {compiled.split} split, in rows chosen by the hash of their content"


def write_notes(compiled: TableData) -> list[str]:
    """Return the notes under a table: definitions, missing values and records, and choices."""
    definitions = "; ".join(metric.definition for metric in compiled.metrics)
    what = f"{definitions[0].upper()}{definitions[1:]}"
    lines = [
        f"{what} on {describe_scored(compiled)}; mean ± standard deviation over n seeds. "
        "Retention: points gained or lost against the untouched backbone on the domains that are not targets. "
        "Trained: the most that any one stage trains. Steps, tokens and seconds count every stage. Differences are "
        "paired by seed. Bold: beyond noise, of a difference or of the best row against every other: the 95 % interval "
        "over documents excludes zero (t on a paired bootstrap's error, with few documents counted as few), and with "
        "several seeds that of a paired t over seeds too. Effective documents: "
        f"{', '.join(f'{name} {count:.0f}' for name, count in describe_documents(compiled).items())}."
    ]
    lines += [*list_few_documents(compiled), *correct_differences(compiled)]
    if compiled.table.relative:
        lines += [
            "",
            f"{'Accuracies' if compiled.metrics == (ACCURACY,) else 'Numbers'} are points gained or lost against the "
            "untouched backbone, whose own stand in its row.",
        ]
    if not all(metric.higher_is_better for metric in compiled.metrics):
        lines += ["", "Where lower is better, a negative difference or retention is a gain."]
    for metric in compiled.metrics:
        if lacking := list_rows_without(compiled, metric):
            lines += ["", f"Records without {metric.heading.lower()} (–): {', '.join(lacking)}."]
        if coarse := list_rows_without_sums(compiled, metric):
            lines += [
                "",
                f"Records without {metric.heading.lower()} by document: {', '.join(coarse)}. Their differences have no "
                "interval over documents and are never bold.",
            ]
    for note, sign in compiled.table.notes.items():
        lines += ["", f"{sign} {escape_html(note)}"]
    if compiled.table.choose:
        lines += [line for sentence in list_chosen_settings(compiled) for line in ("", sentence)]
    astray = [line.name for line in compiled.lines if line.astray]
    if astray:
        lines += ["", f"Tokens or operations more than 1 % off the forecast: {', '.join(astray)}."]
    missing = [line.name for line in compiled.lines if not line.quality]
    if missing:
        lines += ["", f"Missing (–): {', '.join(missing)}. `mode reproduce` with this table's name fills them."]
    if compiled.untimed:
        lines += ["", write_time_note(compiled.untimed)]
    if compiled.overlap:
        lines += ["", write_overlap_note(compiled.overlap)]
    if compiled.left_out:
        lines += ["", f"{compiled.left_out} matching records on other data or another backbone are left out."]
    return lines


def write_time_note(untimed: Sequence[str]) -> str:
    """Return the note on rows that were timed under other conditions than most."""
    return (
        "Seconds and tokens per second are those of rows that were timed on the same machine with the same version "
        f"of the code; others have a dash: {', '.join(untimed)}. `mode bench` compares speed."
    )


def list_rows_without(compiled: TableData, metric: Metric) -> list[str]:
    """Return the names of rows whose records do not hold a metric, such as records from before the metric."""
    names = [column.name for column in compiled.columns if column.metric is metric and column.part != RETENTION]
    lines = [line for line in compiled.lines if line.quality]
    return [line.name for line in lines if any(line.cell(name) is None for name in names)]


def list_rows_without_sums(compiled: TableData, metric: Metric) -> list[str]:
    """Return the names of rows whose records hold a metric but not its sums over documents."""
    average = Column(AVERAGE, metric).name
    return [
        line.name
        for line in compiled.lines
        if any(average in line.quality[seed] and average not in line.resampled[seed] for seed in line.quality)
    ]


def describe_documents(compiled: TableData) -> dict[str, float]:
    """Return the effective number of documents, by domain."""
    found = next((line.documents for line in compiled.lines if line.documents), {})
    return {name: found[name] for name in compiled.domains if name in found}


def list_few_documents(compiled: TableData) -> list[str]:
    """Return a note on the domains that have too few effective documents for an interval, or for a sure one."""
    found = describe_documents(compiled)
    none = [name for name, count in found.items() if count < FEWEST]
    few = [name for name, count in found.items() if FEWEST <= count < FEW]
    lines = []
    if none:
        lines += ["", f"Fewer than {FEWEST} effective documents, so no interval over documents: {', '.join(none)}."]
    if few:
        lines += [
            "",
            f"Fewer than {FEW} effective documents, so other documents may decide otherwise: {', '.join(few)}.",
        ]
    return lines


def correct_differences(compiled: TableData) -> list[str]:
    """Return a note on the differences that are beyond noise one by one, but not after Holm's correction.

    The correction is over all differences and columns of the table. The p-value of a difference is the larger one of
    those over documents and over seeds.
    """
    found = {}
    for left, right in compiled.table.differences:
        one, other = compiled.line(left), compiled.line(right)
        for column in compiled.columns:
            gap = one.minus(other, column.name)
            if gap is not None and gap.p is not None:
                found[escape_markdown(f"{one.label} − {other.label} on {column.heading}")] = gap.p
    corrected = correct_holm(list(found.values()))
    lost = [name for (name, p), many in zip(found.items(), corrected, strict=True) if p < 0.05 <= many]
    if len(found) < 2:
        return []
    what = "; ".join(lost) if lost else "none"
    return ["", f"Beyond noise alone, but not after Holm's correction for these {len(found)} comparisons: {what}."]


def write_overlap_note(domains: Sequence[str]) -> str:
    """Return the note that the backbone may have seen some of the scored text in pretraining."""
    return (
        f"The text of {' and '.join(domains)} is not that of the backbone's pretraining (another version of Python, "
        "say), so its splits fall differently and the backbone may have seen some of what is scored."
    )


def list_chosen_settings(compiled: TableData) -> list[str]:
    """Return the best setting of each method, of the rows `method@setting`: by average accuracy and by the targets."""
    columns = {AVERAGE: "the average over all domains", TARGET: "the targets alone"}
    found = {what: find_best_settings(compiled, column) for column, what in columns.items()}
    return [f"Chosen by {what}: {'; '.join(chosen)}." for what, chosen in found.items() if chosen]


def find_best_settings(compiled: TableData, column: str) -> list[str]:
    """Return the setting of each method that is best in a column, with its value, as text."""
    best: dict[str, tuple[float, str]] = {}
    for line in compiled.lines:
        method, at, setting = line.name.partition("@")
        value = line.cell(column)
        if at and value is not None:
            best[method] = max(best.get(method, (-math.inf, "")), (value.mean, setting))
    return [f"{method} {setting} ({value:.2f})" for method, (value, setting) in best.items()]


def render_latex(compiled: TableData) -> str:
    """Return a compiled table in LaTeX (booktabs)."""
    table = make_frame(compiled, strong=r"\textbf{{{}}}")
    table.columns = pd.Index([escape_latex(name) for name in table.columns])
    table["Method"] = table["Method"].map(escape_latex)
    table = table.map(lambda text: text.replace("±", r"$\pm$").replace("−", "$-$").replace("–", "--"))
    return str(table.to_latex(index=False, column_format="l" + "r" * (len(table.columns) - 1)))


def render_csv(compiled: TableData) -> str:
    """Return a compiled table as CSV: one line per row and column, with mean, standard deviation and n.

    Lines of differences also have the ends of the 95 % interval over documents. Lines of frontiers have the name of a
    method, and `frontier/LOSS` or `frontier/gain` as their column. The last lines have the rank correlation of
    divergence and retention, over all rows and over those without gates.
    """
    rows: list[dict[str, Any]] = []
    for line in compiled.lines:
        for column in compiled.columns:
            value = line.cell(column.name)
            if value is not None:
                rows.append(
                    {"row": line.name, "column": column.name, "mean": value.mean, "std": value.std, "n": value.n}
                )
        rows += [
            {"row": line.name, "column": name, "mean": amount} for name, amount in line.cost.items() if name != "n"
        ]
    for left, right in compiled.table.differences:
        for column in compiled.columns:
            gap = compiled.line(left).minus(compiled.line(right), column.name)
            if gap is not None:
                summary = {"mean": gap.cell.mean, "std": gap.cell.std, "n": gap.cell.n}
                ends = {} if gap.documents is None else {"low": gap.documents.low, "high": gap.documents.high}
                rows.append({"row": f"{left} - {right}", "column": column.name, **summary, **ends})
    for frontier in list_frontiers(compiled) if compiled.table.frontiers else []:
        found = {f"{loss:g}": best for loss in LOSSES if (best := frontier.find_best(loss)) is not None}
        values = {place: get_mean(best, TARGET) for place, best in found.items()}
        values |= {"gain": frontier.mean_gain} if frontier.rows else {}
        rows += [
            {"row": frontier.method, "column": f"frontier/{place}", "mean": value} for place, value in values.items()
        ]
    for name, gated in (("all rows", True), ("rows without gates", False)):
        if (ranked := correlate_divergence(compiled, gated=gated)) is not None:
            rows.append({"row": name, "column": "divergence/retention", "mean": ranked[0], "n": ranked[1]})
    return str(
        pd.DataFrame(rows, columns=["row", "column", "mean", "std", "n", "low", "high"]).to_csv(
            index=False, float_format="%.6g"
        )
    )
