"""Render tables from records: Markdown, LaTeX, CSV. A pure function of the records and the table's YAML."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mode.checked import ConfigError, NothingError
from mode.compiled import BACKBONE, Compiled, Line, compile_table
from mode.data.contamination import PRETRAINING
from mode.files import is_drawn
from mode.finding import findings
from mode.record import read_records
from mode.routing import ROUTING_NOTE, routing_frame
from mode.table import load_table, stem

COLUMNS = {
    "average": "Average",
    "retention": "Retention",
    "total": "Total M",
    "trainable": "Trained M",
    "steps": "Steps",
    "tokens": "Tokens M",
    "seconds": "Seconds",
    "n": "n",
}
COST_COLUMNS = {name: label for name, label in COLUMNS.items() if name not in ("average", "retention")}
COSTS = {
    "added": "Added M",
    "active": "Active M",
    "flops": "TFLOPs",
    "rate": "Tokens/s",
    "memory": "Peak GB",
    "domain": "Domain MB",
}
"""What else a row costs, in a table of its own."""
FORMATS = {
    **dict.fromkeys(("total", "trainable", "added", "active"), ".3f"),
    **{"steps": ",.0f", "tokens": ",.2f", "seconds": ",.0f", "n": ".0f"},
    **{"flops": ",.2f", "rate": ",.0f", "memory": ".2f", "domain": ",.2f"},
}


WORDED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
"""Characters that LaTeX has no escape for, but a name."""
COST_NOTE = (
    "Added: parameters beside the backbone's; active: those that a token's prediction can depend on. TFLOPs: "
    "operations of training over all stages, counted on one row of the model, times its tokens. Peak: of the process, "
    "with scoring. Domain: weights on disk of a stage on one domain, or else of all that the row trained. A dash: "
    "nothing was trained, or the record does not say."
)


CONTAMINATION_NOTE = (
    "Contamination: per cent of the 13-token n-grams of what is scored that also occur in each domain's training "
    "split, and in what the backbone is known to have been pretrained on."
)


def render(compiled: Compiled) -> dict[str, str]:
    """Render a compiled table as text by file suffix: md, tex, csv."""
    return {"md": markdown(compiled), "tex": latex(compiled), "csv": csv(compiled)}


def frame(compiled: Compiled, *, strong: str = "{}") -> pd.DataFrame:
    """Return the table as people read it; what is beyond noise is set in `strong`: winners, and differences."""
    rows = []
    winners = {column: None if compiled.table.relative else winner(compiled, column) for column in compiled.columns}
    for line in compiled.lines:
        row: dict[str, str] = {"Method": line.label}
        for column in compiled.columns:
            text, stands_out = shown_cell(compiled, line, column)
            row[heading(column)] = strong.format(text) if stands_out or winners[column] == line.name else text
        rows.append(row | costs(line, COST_COLUMNS))
    for left, right in compiled.table.differences:
        rows.append(difference(compiled, left, right, strong))
    return pd.DataFrame(rows)


def shown_cell(compiled: Compiled, line: Line, column: str) -> tuple[str, bool]:
    """Render a cell, and say whether it is a difference beyond noise: in a relative table, to the backbone's."""
    value = line.cell(column)
    if value is None:
        return "–", False
    if compiled.table.relative and line.name != BACKBONE and column != "retention":
        gap = line.minus(compiled.line(BACKBONE), column)
        return (gap.cell.text(signed=True), gap.holds) if gap else ("–", False)
    return value.text(signed=column == "retention"), False


def cost_frame(compiled: Compiled) -> pd.DataFrame:
    """Return what else the rows cost: of what is known of at least one."""
    names = {name: label for name, label in COSTS.items() if any(name in line.cost for line in compiled.lines)}
    return pd.DataFrame([{"Cost": line.label, **costs(line, names)} for line in compiled.lines])


def contamination_frame(compiled: Compiled) -> pd.DataFrame:
    """Return which share of what is scored occurs where in training."""
    rows = []
    for name, shares in compiled.contamination.items():
        row = {f"{compiled.split.capitalize()} split": name.capitalize()}
        for where in [*compiled.domains, PRETRAINING]:
            value = shares.get(where)
            row[where.capitalize()] = "not known" if value is None else f"{100 * value:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def winner(compiled: Compiled, column: str) -> str | None:
    """Return the row with the best mean of a quality column, if it is better than every other beyond noise."""
    cells = [(line, line.cell(column)) for line in compiled.lines if competes(line, column)]
    lines = sorted(((value.mean, line.name) for line, value in cells if value is not None), reverse=True)
    if len(lines) < 2:
        return None
    best = compiled.line(lines[0][1])
    gaps = [best.minus(compiled.line(name), column) for _, name in lines[1:]]
    return best.name if all(gap is not None and gap.holds and gap.cell.mean > 0.0 for gap in gaps) else None


def competes(line: Line, column: str) -> bool:
    """Say whether a line can be a column's best: the backbone's retention is zero by definition."""
    return line.name != BACKBONE or column != "retention"


def heading(column: str) -> str:
    """Return a column's heading."""
    return COLUMNS.get(column, column.capitalize())


def costs(line: Line, labels: Mapping[str, str]) -> dict[str, str]:
    """Render costs of a line under their headings."""
    return {
        label: format(line.cost[name], FORMATS[name]) if name in line.cost else "–" for name, label in labels.items()
    }


def difference(compiled: Compiled, left: str, right: str, strong: str = "{}") -> dict[str, str]:
    """Render the row of paired differences between two lines."""
    one, other = compiled.line(left), compiled.line(right)
    row = {"Method": f"{one.label} − {other.label}"}
    for column in compiled.columns:
        gap = one.minus(other, column)
        text = gap.cell.text(signed=True) if gap else "–"
        row[heading(column)] = strong.format(text) if gap and gap.holds else text
    empty = dict.fromkeys(COST_COLUMNS.values(), "")
    both = [seed for seed in one.quality if seed in other.quality]
    return row | {name: value for name, value in empty.items() if name not in row} | {"n": str(len(both))}


def intervals(compiled: Compiled) -> pd.DataFrame:
    """Return the differences' intervals over documents."""
    rows = []
    for left, right in compiled.table.differences:
        one, other = compiled.line(left), compiled.line(right)
        row = {"Difference": f"{one.label} − {other.label}"}
        for column in compiled.columns:
            gap = one.minus(other, column)
            row[heading(column)] = f"{gap.documents.low:+.2f} to {gap.documents.high:+.2f}" if gap else "–"
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(compiled: Compiled) -> str:
    """Render a compiled table in Markdown, with its notes and the published values."""
    parts = [f"# {compiled.table.title}", "", aligned(frame(compiled, strong="**{}**"))]
    parts += ["", *notes(compiled)]
    parts += [line for sentence in findings(compiled) for line in ("", f"- {sentence}")]
    if compiled.table.differences:
        parts += ["", "95 % intervals of the differences over documents:", ""]
        parts += [aligned(intervals(compiled))]
    parts += ["", COST_NOTE, "", aligned(cost_frame(compiled))]
    if compiled.contamination:
        parts += ["", CONTAMINATION_NOTE, "", aligned(contamination_frame(compiled))]
    if (routed := routing_frame(compiled)) is not None:
        parts += ["", ROUTING_NOTE, "", aligned(routed)]
    published = published_frame(compiled)
    if published is not None and compiled.table.published is not None:
        source = compiled.table.published
        parts += ["", f"Published: {source.source}"]
        parts += ["", aligned(published)] if len(published) else []  # values of a figure stand in the note
        parts += ["", source.note] if source.note else []
    return "\n".join(parts).rstrip() + "\n"


def aligned(table: pd.DataFrame) -> str:
    """Render a frame of texts in Markdown, its first column to the left."""
    # Without numparse a cell stays the text it is: tabulate would turn 12.30 into 12.3 and +1.50 into 1.5.
    sides = ["left", *["right"] * (len(table.columns) - 1)]
    return str(table.to_markdown(index=False, disable_numparse=True, colalign=sides))


def notes(compiled: Compiled) -> list[str]:
    """Say what the columns mean, what was chosen, and what is missing."""
    lines = [
        f"Next-token top-1 accuracy in per cent on the whole {compiled.split} split; mean ± standard deviation over "
        "n seeds. "
        "Retention: points gained or lost against the untouched backbone on the domains that are not targets. "
        "Trained: the most that any one stage trains. Steps, tokens and seconds count every stage. Differences are "
        "paired by seed. Bold: beyond noise, of a difference or of the best row against every other: the 95 % interval "
        "over documents excludes zero (t on a paired bootstrap's error, with few documents counted as few), and with "
        "several seeds that of a paired t over seeds too. Effective documents: "
        f"{', '.join(f'{name} {count:.0f}' for name, count in documents(compiled).items())}."
    ]
    if compiled.table.relative:
        lines += [
            "",
            "Accuracies are points gained or lost against the untouched backbone, whose own stand in its row.",
        ]
    for note, sign in compiled.table.notes.items():
        lines += ["", f"{sign} {note}"]
    if compiled.table.choose:
        lines += ["", *chosen_settings(compiled)]
    astray = [line.name for line in compiled.lines if line.astray]
    if astray:
        lines += ["", f"Tokens or operations more than 1 % off the forecast: {', '.join(astray)}."]
    missing = [line.name for line in compiled.lines if not line.quality]
    if missing:
        lines += ["", f"Missing (–): {', '.join(missing)}. `mode reproduce` with this table's name fills them."]
    if compiled.overlap:
        lines += ["", overlap_note(compiled.overlap)]
    if compiled.left_out:
        lines += ["", f"{compiled.left_out} matching records on other data or another backbone are left out."]
    return lines


def documents(compiled: Compiled) -> dict[str, float]:
    """Return the effective documents of every domain."""
    found = next((line.documents for line in compiled.lines if line.documents), {})
    return {name: found[name] for name in compiled.domains if name in found}


def overlap_note(domains: Sequence[str]) -> str:
    """Say that the backbone may have seen some of the text in pretraining."""
    return (
        f"The text of {' and '.join(domains)} is not that of the backbone's pretraining (another version of Python, "
        "say), so its splits fall differently and the backbone may have seen some of what is scored."
    )


def chosen_settings(compiled: Compiled) -> list[str]:
    """Say for each method which of its rows `method@setting` has the best average accuracy."""
    best: dict[str, tuple[float, str]] = {}
    for line in compiled.lines:
        method, at, setting = line.name.partition("@")
        value = line.cell("average")
        if at and value is not None:
            best[method] = max(best.get(method, (-math.inf, "")), (value.mean, setting))
    return [
        "Chosen by the average over all domains: "
        + "; ".join(f"{method} {setting} ({value:.2f})" for method, (value, setting) in best.items())
        + "."
    ]


def published_frame(compiled: Compiled) -> pd.DataFrame | None:
    """Return the published values, with the averages and differences worked out from them."""
    source = compiled.table.published
    if source is None:
        return None
    labels = {row.name: row.label for row in compiled.table.rows}
    rows: list[dict[str, Any]] = []
    for name, values in source.rows.items():
        rows.append({"Method": labels.get(name, name), **with_average(values)})
    for left, right in compiled.table.differences:
        if left in source.rows and right in source.rows:
            both = [key for key in source.rows[left] if key in source.rows[right]]
            gap = {key: source.rows[left][key] - source.rows[right][key] for key in both}
            rows.append({"Method": f"{labels[left]} − {labels[right]}", **with_average(gap)})
    return pd.DataFrame(rows).map(lambda value: value if isinstance(value, str) else dashed(value))


def dashed(value: float) -> str:
    """Render a published value, or a dash where there is none.

    >>> dashed(76.1), dashed(math.nan)
    ('76.10', '–')
    """
    return "–" if math.isnan(value) else f"{value:.2f}"


def with_average(values: Mapping[str, float]) -> dict[str, float]:
    """Return values under their headings, with their average."""
    named = {name.capitalize(): round(value, 2) for name, value in values.items()}
    if len(named) < 2:
        return named
    return {**named, "Average": round(statistics.fmean(values.values()), 2)}


def latex(compiled: Compiled) -> str:
    """Render a compiled table in LaTeX (booktabs)."""
    table = frame(compiled, strong=r"\textbf{{{}}}")
    table.columns = pd.Index([escape(name) for name in table.columns])
    table["Method"] = table["Method"].map(escape)
    table = table.map(lambda text: text.replace("±", r"$\pm$").replace("−", "$-$").replace("–", "--"))
    return str(table.to_latex(index=False, column_format="l" + "r" * (len(table.columns) - 1)))


def escape(text: str) -> str:
    r"""Escape what LaTeX would take for a command.

    >>> escape("100% of A & B_1"), escape("a^b")
    ('100\\% of A \\& B\\_1', 'a\\textasciicircum{}b')
    """
    return re.sub(r"[&%$#_{}\\~^<>]", lambda found: WORDED.get(found[0], rf"\{found[0]}"), text)


def csv(compiled: Compiled) -> str:
    """Render a compiled table as CSV: one line per row and column, with mean, standard deviation and n.

    Differences have the ends of their 95 % interval over documents besides.
    """
    rows: list[dict[str, Any]] = []
    for line in compiled.lines:
        for column in compiled.columns:
            value = line.cell(column)
            if value is not None:
                rows.append({"row": line.name, "column": column, "mean": value.mean, "std": value.std, "n": value.n})
        rows += [
            {"row": line.name, "column": name, "mean": amount} for name, amount in line.cost.items() if name != "n"
        ]
    for left, right in compiled.table.differences:
        for column in compiled.columns:
            gap = compiled.line(left).minus(compiled.line(right), column)
            if gap is not None:
                told = {"mean": gap.cell.mean, "std": gap.cell.std, "n": gap.cell.n}
                ends = {"low": gap.documents.low, "high": gap.documents.high}
                rows.append({"row": f"{left} - {right}", "column": column, **told, **ends})
    return str(
        pd.DataFrame(rows, columns=["row", "column", "mean", "std", "n", "low", "high"]).to_csv(
            index=False, float_format="%.6g"
        )
    )


def report(
    name: str, results: Path, overrides: Sequence[str] = (), extra: Path | None = None, *, write: bool | None = True
) -> tuple[str, Path]:
    """Render a table from the records of a results folder and put it there with its figure.

    `write=False` puts nothing there, and `write=None` only what is not there already.

    Returns:
        The Markdown, and the path of its file.

    Raises:
        ConfigError: A file is not a whole record; `NothingError`: no record belongs to the table.
    """
    table = load_table(name, extra)
    compiled = compile_table(table, read_records(results), overrides, extra)
    if not compiled.says_something:
        raise NothingError(f"no record of {name} in {results / 'records'}: make them with `mode reproduce {name}`")
    base = results / stem(name, overrides, table.overrides)
    rendered = {base.with_suffix(f".{suffix}"): text for suffix, text in render(compiled).items()}
    if write is False or (write is None and is_drawn(base.with_suffix(".png"), rendered, results / "records")):
        return markdown(compiled), base.with_suffix(".md")
    from mode.figure import draw, draw_curves, draw_gates

    for path, text in rendered.items():
        path.write_text(text, encoding="utf-8")
    (draw_curves if table.curves else draw)(compiled, base.with_suffix(".png"))
    if not table.choose:
        draw_gates(compiled, base.with_name(f"{base.name}-gates.png"))
    return markdown(compiled), base.with_suffix(".md")


def check_tables(results: Path, names: Sequence[str], extra: Path | None = None) -> list[Path]:
    """Return the committed table files that no longer follow from the records beside them.

    Raises:
        ConfigError: There is no record at all.
    """
    records = read_records(results)
    if not records:
        raise ConfigError(f"no record in {results / 'records'}, so no table can follow from any")
    stale: list[Path] = []
    for name in names:
        table = load_table(name, extra)
        for overrides in table.variants:
            compiled = compile_table(table, records, overrides, extra)
            base = results / stem(name, overrides, table.overrides)
            expected = render(compiled) if compiled.says_something else {}
            for suffix in ("md", "tex", "csv"):
                path = base.with_suffix(f".{suffix}")
                found = path.read_text("utf-8") if path.exists() else None
                if found != expected.get(suffix):
                    stale.append(path)
    return stale
