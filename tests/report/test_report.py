"""Tables are computed from records alone, and rendered without changing a digit."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import math
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from mode.config import identity
from mode.records.record import SCHEMA, Record, read_record
from mode.report.estimate import compile_in_full
from mode.report.frames import make_frame
from mode.report.render import check_tables, render_table, report
from mode.report.text import render_latex, render_markdown
from mode.tables.compile import TableData, compile_table
from mode.tables.table import compose_row, load_table
from tests.cli.test_cli import call
from tests.conftest import World
from tests.support.refusals import refused

pytestmark = pytest.mark.usefixtures("composed_once")

ROWS = [
    {"name": "backbone", "label": "Backbone", "overrides": ["method=backbone"]},
    {"name": "sft", "label": "SFT", "overrides": ["method=sft"]},
    {"name": "lora", "label": "LoRA & 100%_x", "overrides": ["method=lora"]},
    {"name": "mode-2x", "label": "MoDE 2x", "overrides": ["method=mode"]},
    {"name": "mode-2x-frozen", "label": "MoDE frozen", "overrides": ["method=mode", "method.train_experts=false"]},
]
# Accuracy of (sums, py, prose) by row and seed. LoRA and MoDE share only the seeds 0 and 1.
SCORES = {
    ("backbone", 0): (0.10, 0.20, 0.60),
    ("sft", 0): (0.50, 0.60, 0.40),
    ("sft", 1): (0.52, 0.61, 0.43),
    ("sft", 2): (0.51, 0.65, 0.41),
    ("lora", 0): (0.30, 0.4012345, 0.55),
    ("lora", 1): (0.34, 0.41, 0.59),
    ("lora", 3): (0.99, 0.99, 0.99),
    ("mode-2x", 0): (0.505, 0.70, 0.58),
    ("mode-2x", 1): (0.515, 0.70, 0.585),
    ("mode-2x", 2): (0.525, 0.70, 0.59),
}
PUBLISHED = {"sft": {"sums": 77.18, "py": 67.9, "prose": 47.95}, "mode-2x": {"sums": 77.47, "py": 67.83, "prose": 49.5}}


@pytest.fixture(scope="module")
def conf(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a configuration folder with tables of its own."""
    folder = tmp_path_factory.mktemp("tables") / "conf"
    shutil.copytree(shared_world.conf, folder)
    settings = [text for text in shared_world.overrides if not text.startswith("paths.")]
    table = {
        "title": "Tiny. A table",
        "overrides": settings,
        "rows": ROWS,
        "differences": [["mode-2x", "sft"], ["mode-2x", "lora"], ["mode-2x-frozen", "sft"]],
        "published": {"source": "Somebody et al.", "note": "A note.", "rows": PUBLISHED},
    }
    (folder / "table" / "tiny.yaml").write_text(yaml.safe_dump(table, sort_keys=False), encoding="utf-8")
    rates = ("0.001", "0.01", "0.1")
    choose = {
        "title": "Choices",
        "overrides": [*settings, "evaluate.split=validation"],
        "choose": True,
        "rows": [
            {"name": f"{m}@lr{lr}", "label": f"{m} {lr}", "overrides": [f"method={m}", f"train.lr={lr}"]}
            for m in ("sft", "lora")
            for lr in rates
        ],
    }
    (folder / "table" / "choices.yaml").write_text(yaml.safe_dump(choose, sort_keys=False), encoding="utf-8")
    (folder / "experiment" / "tiny_long.yaml").write_text(
        "# @package _global_\ntrain: {weight_decay: 0.5}\n", encoding="utf-8"
    )
    both = {**table, "experiments": ["tiny_long"]}
    (folder / "table" / "both.yaml").write_text(yaml.safe_dump(both, sort_keys=False), encoding="utf-8")
    return folder


def scored(accuracy: float) -> dict[str, Any]:
    """Return a domain's score with the same accuracy in every document."""
    return {"accuracy": accuracy, "document_tokens": [10**7] * 8, "document_hits": [round(10**7 * accuracy)] * 8}


def made(conf: Path, table: str, row: str, seed: int, scores: tuple[float, ...], **changes: Any) -> Record:
    """Return the record that a run of a table's row would leave."""
    loaded = load_table(table, conf)
    chosen = next(item for item in loaded.rows if item.name == row)
    run = compose_row(loaded, chosen, seed, [], conf)
    asked = identity.describe_run(run) | {"backbone": {"name": run.backbone.name}}
    conditions = {
        "data": {name: f"data of {name}" for name in run.domains},
        "backbone": changes.pop("backbone", "weights"),
    }
    trains = row != "backbone"
    happened = {
        "steps": run.train.steps * trains,
        "tokens": 1_000_000 * trains,
        "seconds": (10.0 + seed) * trains,
        "parameters": {"total": 5_000_000, "trainable": 2_000_000 * trains, "added": 0},
        "split": run.evaluate.split,
        "scores": {name: scored(value) for name, value in zip(run.evaluate.domains, scores, strict=True)},
        "curve": [],
    }
    needs = list(changes.pop("needs", ()))
    return Record(
        schema=SCHEMA,
        id=identity.digest_run(asked, {**conditions["data"], "backbone": conditions["backbone"]}),
        asked=json.loads(json.dumps(asked)),
        happened=happened | changes,
        provenance={**conditions, "precision": "fp32", "needs": needs},
    )


def stage(number: int, steps: int, trainable: int, seconds: float) -> Record:
    """Return the record of an earlier stage."""
    happened = {
        **{"steps": steps, "tokens": 500_000, "seconds": seconds, "split": "test", "curve": []},
        "scores": {"py": scored(0.5)},
        "parameters": {"total": trainable, "trainable": trainable, "added": 0},
    }
    asked = {
        **{"seed": number, "targets": ["py"], "backbone": {"name": "tiny"}, "method": {"_target_": "mode.Stage"}},
        **{"train": {"sequence_length": 32}, "evaluate": {"split": "test"}},
    }
    conditions = {"data": {"py": "data of a stage"}, "backbone": "", "precision": "fp32", "needs": []}
    return with_id(Record(SCHEMA, "", asked, happened, conditions))


def with_id(record: Record) -> Record:
    """Return a record with the id that follows from its content."""
    return dataclasses.replace(record, id=record.compute_id())


@pytest.fixture(scope="module")
def records(conf: Path) -> list[Record]:
    stages = [stage(1, 4, 1_000_000, 5.0), stage(2, 6, 3_000_000, 7.0)]
    return stages + [
        made(conf, "tiny", row, seed, scores, needs=[below.id for below in stages] if row == "mode-2x" else [])
        for (row, seed), scores in SCORES.items()
    ]


@pytest.fixture(scope="module")
def compiled(conf: Path, records: list[Record]) -> TableData:
    return compile_table(load_table("tiny", conf), records, [], conf)


def of(row: str, place: int) -> list[float]:
    return [100 * scores[place] for (name, _), scores in SCORES.items() if name == row]


# --- cells


@pytest.mark.parametrize(("column", "place"), [("sums", 0), ("py", 1), ("prose", 2)])
@pytest.mark.parametrize("row", ["backbone", "sft", "lora", "mode-2x"])
def test_a_cell_is_the_mean_and_sample_deviation_over_seeds(
    compiled: TableData, row: str, column: str, place: int
) -> None:
    cell, values = compiled.line(row).cell(column), of(row, place)
    assert cell is not None
    assert cell.n == len(values)
    assert cell.mean == pytest.approx(statistics.fmean(values))
    expected = math.nan if row == "backbone" else statistics.stdev(values)  # a single seed has no deviation
    assert cell.std == pytest.approx(expected, nan_ok=True)


def test_average_and_retention_are_worked_out_per_seed(compiled: TableData) -> None:
    average, retention = compiled.line("sft").cell("average"), compiled.line("sft").cell("retention")
    assert average is not None
    assert retention is not None
    per_seed = [statistics.fmean(scores) * 100 for (row, _), scores in SCORES.items() if row == "sft"]
    assert (average.mean, average.std) == pytest.approx((statistics.fmean(per_seed), statistics.stdev(per_seed)))
    lost = [100 * (scores[2] - 0.60) for (row, _), scores in SCORES.items() if row == "sft"]
    assert (retention.mean, retention.std) == pytest.approx((statistics.fmean(lost), statistics.stdev(lost)))
    bare = compiled.line("backbone").cell("retention")
    assert bare is not None
    assert bare.mean == 0.0


def test_without_a_backbone_record_there_is_no_retention(conf: Path, records: list[Record]) -> None:
    headless = [record for record in records if "Untouched" not in record.asked["method"]["_target_"]]
    compiled = compile_table(load_table("tiny", conf), headless, [], conf)
    assert compiled.line("sft").cell("retention") is None
    assert compiled.line("sft").cell("average") is not None


def test_differences_are_paired_over_the_seeds_that_both_have(compiled: TableData) -> None:
    gap = compiled.line("mode-2x").minus(compiled.line("lora"), "prose")
    pairs = [58.0 - 55.0, 58.5 - 59.0]
    assert gap is not None
    told = (gap.cell.n, gap.cell.mean, gap.cell.std)
    assert told == pytest.approx((2, statistics.fmean(pairs), statistics.stdev(pairs)))
    assert compiled.line("mode-2x-frozen").minus(compiled.line("sft"), "prose") is None


def test_cost_counts_every_stage_once(compiled: TableData, conf: Path, records: list[Record]) -> None:
    cost = compiled.line("mode-2x").cost
    assert cost["steps"] == 4 + 4 + 6
    assert cost["tokens"] == pytest.approx(2.0)
    assert cost["seconds"] == pytest.approx(statistics.fmean([10 + 12, 11 + 12, 12 + 12]))
    assert (cost["total"], cost["trainable"], cost["n"]) == (5.0, 3.0, 3)
    assert compiled.line("sft").cost["steps"] == 4
    assert compiled.line("mode-2x-frozen").cost == {"n": 0}
    # A stage that two others stand on is paid for once.
    below = stage(0, 100, 0, 1.0)
    shared = [
        dataclasses.replace(record, provenance={**record.provenance, "needs": [below.id]})
        if record.request.method == "mode.Stage"
        else record
        for record in records
    ]
    deeper = compile_table(load_table("tiny", conf), [*shared, below], [], conf)
    assert deeper.line("mode-2x").cost["steps"] == 100 + 4 + 4 + 6


def test_a_stage_without_a_record_is_refused(conf: Path, records: list[Record]) -> None:
    with refused(f"run {stage(1, 4, 1_000_000, 5.0).id}"):
        compile_table(load_table("tiny", conf), records[1:], [], conf)


def test_only_records_of_one_data_and_backbone_are_compared(conf: Path, records: list[Record]) -> None:
    strangers = [made(conf, "tiny", "sft", seed, (1.0, 1.0, 1.0), backbone="other") for seed in (0, 5)]
    compiled = compile_table(load_table("tiny", conf), [*strangers, *records], [], conf)
    assert sorted(compiled.line("sft").quality) == [0, 1, 2]
    assert compiled.left_out == 2
    assert "2 matching records on other data or another backbone are left out." in render_markdown(compiled)


def test_a_record_of_another_configuration_is_no_part_of_the_table(conf: Path, records: list[Record]) -> None:
    other = dataclasses.replace(
        records[3], id="x", asked={**records[3].asked, "train": {"steps": 5, "sequence_length": 32}}
    )
    compiled = compile_table(load_table("tiny", conf), [*records, other], [], conf)
    assert sorted(compiled.line("sft").quality) == [0, 1, 2]
    assert compiled.left_out == 0


# --- rendering


def cells(line: str) -> list[str]:
    """Read the cells of a row of a Markdown table, as text without escapes."""
    return [html.unescape(re.sub(r"\\(.)", r"\1", cell.strip())) for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def parsed(text: str) -> dict[str, dict[str, str]]:
    """Read the first Markdown table: cells by label and heading."""
    lines = [line for line in text.split("\n\n")[1].splitlines() if line.startswith("|")]
    heads = cells(lines[0])
    return {row[0]: dict(zip(heads, row, strict=True)) for row in map(cells, lines[2:])}


def test_markdown_shows_every_cell(compiled: TableData) -> None:
    table = parsed(render_markdown(compiled))
    assert list(table) == [
        *(row["label"] for row in ROWS),
        "MoDE 2x − SFT",
        "MoDE 2x − LoRA & 100%_x",
        "MoDE frozen − SFT",
    ]
    assert list(table["SFT"]) == [
        *("Method", "Sums", "Py", "Prose", "Average", "Retention"),
        *("Total M", "Trained M", "Steps", "Tokens M", "Seconds", "n"),
    ]
    assert table["SFT"]["Sums"] == "51.00 ± 1.00"
    assert table["SFT"]["Retention"] == "-18.67 ± 1.53"
    assert table["Backbone"]["Py"] == "20.00"
    assert table["Backbone"]["Steps"] == "0"
    assert table["MoDE 2x"]["Seconds"] == "23"
    assert table["MoDE 2x"]["Tokens M"] == "2.00"
    assert (table["MoDE 2x"]["n"], table["Backbone"]["n"], table["MoDE frozen"]["n"]) == ("3", "1", "0")
    assert table["MoDE 2x − SFT"]["Sums"] == "+0.50 ± 1.00"
    assert table["MoDE 2x − LoRA & 100%_x"]["n"] == "2"


def test_what_else_rows_cost_stands_in_a_table_of_its_own(conf: Path, compiled: TableData) -> None:
    block = render_markdown(compiled).partition("does not say.")[2].strip()
    table = parsed(f"\n\n{block}")
    assert list(table["SFT"]) == ["Cost", "Added M", "Tokens/s"]  # what no record says has no column
    assert table["SFT"]["Tokens/s"] == f"{1e6 / 11:,.0f}"
    assert table["MoDE frozen"]["Tokens/s"] == table["Backbone"]["Tokens/s"] == "–"
    told = {"flops": 3e12, "forecast": {"tokens": 1_000_000, "flops": 3e12, "active": 4_000_000}}
    more = made(conf, "tiny", "sft", 0, (0.5, 0.6, 0.4), peak_memory_bytes=2_500_000_000, kept_bytes=1_500_000, **told)
    line = compile_table(load_table("tiny", conf), [more], [], conf).line("sft")
    assert (line.cost["active"], line.cost["flops"]) == (4.0, 3.0)
    assert (line.cost["memory"], line.cost["domain"], line.astray) == (2.5, 1.5, False)
    astray = dataclasses.replace(more, happened={**more.happened, "flops": 3.1e12})
    text = render_markdown(compile_table(load_table("tiny", conf), [astray], [], conf))
    assert "Tokens or operations more than 1 % off the forecast: sft." in text


def test_contamination_is_that_of_any_record_of_the_same_data_and_split(conf: Path) -> None:
    shares = {"sums": {"sums": 0.5, "py": 0.0, "prose": 0.0, "pretraining": None}}
    shares |= {"py": {"sums": 0.0, "py": 0.037, "prose": 0.0, "pretraining": 0.25}}
    shares |= {"prose": {"sums": 0.0, "py": 0.0, "prose": 0.00004, "pretraining": 0.0}}
    without = made(conf, "tiny", "sft", 0, (0.5, 0.6, 0.4))
    told = made(conf, "tiny", "sft", 1, (0.5, 0.6, 0.4), contamination=shares)
    other = made(conf, "tiny", "lora", 1, (0.5, 0.6, 0.4), contamination=shares)
    validation = dataclasses.replace(other, happened={**other.happened, "split": "validation"})

    def text(*records: Record) -> str:
        return render_markdown(compile_table(load_table("tiny", conf), records, [], conf))

    assert "Contamination" not in text(without, validation)
    table = parsed("\n\n" + text(without, validation, told).partition("pretrained on.")[2].strip())
    cells = {name: list(row.values())[1:] for name, row in table.items()}
    assert cells["Sums"] == ["50.00", "0.00", "0.00", "not known"]
    assert cells["Py"] == ["0.00", "3.70", "0.00", "25.00"]
    assert cells["Prose"] == ["0.00", "0.00", "0.00", "0.00"]


def test_a_missing_row_is_a_dash_and_a_note(compiled: TableData) -> None:
    text = render_markdown(compiled)
    row = parsed(text)["MoDE frozen"]
    assert {row[name] for name in row if name not in ("Method", "n")} == {"–"}
    assert {parsed(text)["MoDE frozen − SFT"][name] for name in ("Sums", "Average", "Retention")} == {"–"}
    assert "Missing (–): mode-2x-frozen. `mode reproduce` with this table's name fills them." in text


def test_a_label_is_plain_text_in_every_format(conf: Path, records: list[Record]) -> None:
    table = load_table("tiny", conf)
    label = "a|b <img src=x> &lt; *c* `d` [e](f)"
    rows = tuple(dataclasses.replace(row, label=label) if row.name == "sft" else row for row in table.rows)
    changed = dataclasses.replace(table, rows=rows, title="<img src=x>")
    compiled = compile_table(changed, records, [], conf)
    text = render_markdown(compiled)
    assert "<img" not in text
    assert parsed(text)[label]["n"] == "3"
    assert all(character not in render_latex(compiled) for character in "|<>")


def test_what_has_to_be_said_of_rows_stands_under_the_table_once(conf: Path, records: list[Record]) -> None:
    table = load_table("tiny", conf)
    said = {"lora": "A port.", "mode-2x": "Our own.", "mode-2x-frozen": "Our own."}
    rows = tuple(dataclasses.replace(row, note=said.get(row.name, "")) for row in table.rows)
    compiled = compile_table(dataclasses.replace(table, rows=rows), records, [], conf)
    text = render_markdown(compiled)
    assert {"LoRA & 100%_x †", "MoDE 2x ‡", "MoDE frozen ‡", "SFT", "MoDE 2x ‡ − SFT"} <= parsed(text).keys()
    assert text.count("† A port.") == text.count("‡ Our own.") == 1
    several = tuple(dataclasses.replace(row, note=f"{number}.") for number, row in enumerate(rows))
    with pytest.raises(ValueError, match=r"\b4\b.*notes"):
        dataclasses.replace(table, rows=several)


def test_a_cell_of_one_seed_keeps_its_digits_and_its_sign(conf: Path) -> None:
    one = [made(conf, "tiny", row, 0, (0.5, 0.615, 0.7 if row == "sft" else 0.6)) for row in ("backbone", "sft", "lora",
           "mode-2x", "mode-2x-frozen")]  # fmt: skip
    table = parsed(render_markdown(compile_table(load_table("tiny", conf), one, [], conf)))
    assert table["SFT"]["Sums"] == "50.00"  # all rows are equal there
    assert table["SFT"]["Retention"] == "**+10.00**"
    assert table["LoRA & 100%_x"]["Prose"] == "60.00"
    assert table["LoRA & 100%_x"]["Retention"] == "+0.00"
    assert table["LoRA & 100%_x"]["Total M"] == "5.000"
    assert table["MoDE 2x − SFT"]["Sums"] == "+0.00"
    assert table["MoDE 2x − SFT"]["Prose"] == "**-10.00**"


def test_a_column_of_nothing_but_numbers_keeps_its_digits_and_signs(conf: Path) -> None:
    table = load_table("tiny", conf)
    alone = dataclasses.replace(table, rows=table.rows[:1], differences=(), published=None)
    row = parsed(render_markdown(compile_table(alone, [made(conf, "tiny", "backbone", 0, (0.1, 0.2, 0.6))], [], conf)))[
        "Backbone"
    ]
    assert (row["Retention"], row["Total M"], row["Tokens M"]) == ("+0.00", "5.000", "0.00")


def test_what_is_beyond_noise_is_bold_and_nothing_else(compiled: TableData) -> None:
    # LoRA has the best mean in most columns for its seed 3 alone, and is worse on the seeds that others have too.
    bold = {
        (label, name)
        for label, row in parsed(render_markdown(compiled)).items()
        for name, text in row.items()
        if "**" in text
    }
    assert bold == {
        ("MoDE 2x", "Py"),
        *(("MoDE 2x − SFT", name) for name in ("Py", "Prose", "Average", "Retention")),
        *(("MoDE 2x − LoRA & 100%_x", name) for name in ("Py", "Average")),
    }


def test_the_backbone_is_bold_where_it_is_best_but_never_for_its_own_retention(
    conf: Path, records: list[Record]
) -> None:
    worse = [record for record in records if record.asked["seed"] != 3]
    table = parsed(render_markdown(compile_table(load_table("tiny", conf), worse, [], conf)))
    assert table["Backbone"]["Prose"] == "**60.00**"
    assert table["Backbone"]["Retention"] == "+0.00"
    assert table["MoDE 2x"]["Retention"] == "-1.50 ± 0.50"  # against LoRA it changes its sign with the seed


def test_published_values_stand_beside_with_average_and_differences(compiled: TableData) -> None:
    block = render_markdown(compiled).partition("Published: Somebody et al.")[2]
    rows = {row[0]: row[1:] for row in map(cells, block.splitlines()) if len(row) == 5}
    assert rows["Method"] == ["Sums", "Py", "Prose", "Average"]
    assert rows["SFT"] == ["77.18", "67.90", "47.95", "64.34"]
    assert rows["MoDE 2x − SFT"] == ["0.29", "-0.07", "1.55", "0.59"]
    assert block.rstrip().endswith("A note.")


def test_latex_is_a_whole_table_with_special_characters_escaped(compiled: TableData) -> None:
    text = render_latex(compiled)
    assert text.startswith("\\begin{tabular}{lrrrrrrrrrrr}")
    assert text.rstrip().endswith("\\end{tabular}")
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + len(ROWS) + 3
    assert all(len(re.split(r"(?<!\\)&", line)) == 12 for line in rows)
    assert r"LoRA \& 100\%\_x & " in text
    assert r"MoDE 2x & 51.50 $\pm$ 1.00 & \textbf{70.00 $\pm$ 0.00}" in text
    assert r"51.00 $\pm$ 1.00" in text
    assert r"MoDE 2x $-$ SFT" in text
    assert not set("±−–") & set(text)


def test_csv_has_the_mean_deviation_and_n_of_every_cell(compiled: TableData) -> None:
    rows = list(csv.DictReader(io.StringIO(render_table(compiled)["csv"])))
    found = {(row["row"], row["column"]): row for row in rows}
    assert len(found) == len(rows)
    prose = found["sft", "prose"]
    assert float(prose["mean"]) == pytest.approx(statistics.fmean(of("sft", 2)), rel=1e-5)
    assert float(prose["std"]) == pytest.approx(statistics.stdev(of("sft", 2)), rel=1e-5)
    assert prose["n"] == "3"
    assert (found["backbone", "prose"]["std"], found["backbone", "prose"]["n"]) == ("", "1")
    assert float(found["mode-2x", "steps"]["mean"]) == 14
    assert not any(row == "mode-2x-frozen" for row, _ in found)
    gap = found["mode-2x - sft", "prose"]
    assert float(gap["low"]) == pytest.approx(float(gap["mean"])) == float(gap["high"])  # all documents are alike


def test_rendering_does_not_depend_on_the_order_of_the_records(
    conf: Path, compiled: TableData, records: list[Record]
) -> None:
    assert render_table(compile_table(load_table("tiny", conf), records[::-1], [], conf)) == render_table(compiled)


def test_the_frame_has_one_row_per_line_and_difference(compiled: TableData) -> None:
    table = make_frame(compiled)
    assert len(table) == len(ROWS) + 3
    assert not table.map(lambda text: "**" in text).any(axis=None)


# --- tables for choosing settings


def test_a_choice_is_made_by_the_average_over_all_domains(conf: Path) -> None:
    accuracy = {  # (sums, py, prose): the best on the targets is not always the best on average
        ("sft", "0.001"): (0.50, 0.50, 0.90),
        ("sft", "0.01"): (0.60, 0.50, 0.10),
        ("sft", "0.1"): (0.10, 0.10, 0.10),
        ("lora", "0.001"): (0.40, 0.44, 0.10),
        ("lora", "0.01"): (0.40, 0.42, 0.99),
    }
    records = [made(conf, "choices", f"{m}@lr{lr}", 0, scores) for (m, lr), scores in accuracy.items()]
    text = render_markdown(compile_table(load_table("choices", conf), records, [], conf))
    assert "Chosen by the average over all domains: sft lr0.001 (63.33); lora lr0.01 (60.33)." in text
    assert "on the whole validation split" in text
    assert "Missing (–): lora@lr0.1." in text


def test_the_split_named_is_the_one_the_records_were_scored_on(conf: Path, compiled: TableData) -> None:
    assert "on the whole test split" in render_markdown(compiled)
    assert "Chosen by" not in render_markdown(compiled)
    tuned = made(conf, "choices", "sft@lr0.1", 0, (0.5, 0.5, 0.5))
    table = dataclasses.replace(load_table("choices", conf), choose=False)
    assert "on the whole validation split" in render_markdown(compile_table(table, [tuned], [], conf))


# --- files


@pytest.fixture
def results(tmp_path: Path, records: list[Record]) -> Path:
    for record in records:
        record.write(tmp_path / "results" / "records")
    return tmp_path / "results"


@pytest.mark.slow
def test_a_report_writes_the_table_in_three_forms_and_a_figure(
    conf: Path, results: Path, records: list[Record]
) -> None:
    compiled = compile_in_full(load_table("tiny", conf), records, [], conf)
    text, path = report("tiny", results, extra=conf)
    assert path == results / "tiny.md"
    assert path.read_text("utf-8") == text == render_markdown(compiled)
    for suffix, expected in render_table(compiled).items():
        assert (results / f"tiny.{suffix}").read_text("utf-8") == expected
    figure = (results / "tiny.png").read_bytes()
    assert figure.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"IEND" in figure[-12:]
    assert len(figure) > 10_000


@pytest.mark.slow
def test_a_table_without_a_point_to_draw_still_has_its_figure(conf: Path, tmp_path: Path) -> None:
    made(conf, "tiny", "sft", 0, (0.5, 0.5, 0.5)).write(tmp_path / "records")
    report("tiny", tmp_path, extra=conf)
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_without_a_record_is_refused_with_the_command_that_makes_them(conf: Path, tmp_path: Path) -> None:
    with refused("tiny", "`mode reproduce tiny`"):
        report("tiny", tmp_path, extra=conf)


@pytest.mark.slow
def test_an_experiment_has_files_of_its_own(conf: Path, results: Path) -> None:
    assert check_tables(results, ["both"], conf) == [results / f"both.{suffix}" for suffix in ("md", "tex", "csv")]
    report("both", results, extra=conf)
    assert check_tables(results, ["both"], conf) == []
    with refused("both", "`mode reproduce both`"):
        report("both", results, ["experiment=tiny_long"], conf)
    (results / "both-tiny_long.md").write_text("a table of nothing", encoding="utf-8")
    assert check_tables(results, ["both"], conf) == [results / "both-tiny_long.md"]


def test_a_fresh_table_passes_the_check(conf: Path, results: Path) -> None:
    report("tiny", results, extra=conf)
    assert check_tables(results, ["tiny"], conf) == []


@pytest.mark.parametrize(
    ("suffix", "old", "new"), [("md", "51.00", "52.00"), ("csv", "sft,sums,51,", "sft,sums,52,"), ("tex", "51.00", "5")]
)
def test_an_edited_number_fails_the_check(conf: Path, results: Path, suffix: str, old: str, new: str) -> None:
    report("tiny", results, extra=conf)
    path = results / f"tiny.{suffix}"
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    assert check_tables(results, ["tiny"], conf) == [path]


@pytest.mark.slow
def test_a_changed_or_lost_record_fails_the_check(conf: Path, results: Path) -> None:
    report("tiny", results, extra=conf)
    path = next((results / "records").glob("sft-*-s1-*.json"))
    record = read_record(path)
    scores = {**record.happened["scores"], "prose": scored(0.5)}
    dataclasses.replace(record, happened={**record.happened, "scores": scores}).write(path.parent)
    stale = [results / f"tiny.{suffix}" for suffix in ("md", "tex", "csv")]
    assert check_tables(results, ["tiny"], conf) == stale
    record.write(path.parent)
    assert check_tables(results, ["tiny"], conf) == []
    path.unlink()
    assert check_tables(results, ["tiny"], conf) == stale


def test_a_table_that_was_never_rendered_fails_the_check_of_a_complete_folder(conf: Path, results: Path) -> None:
    assert len(check_tables(results, ["tiny"], conf)) == 3
    assert check_tables(results, ["tiny"], conf, complete=False) == []
    (results / "tiny.md").write_text("a table", "utf-8")
    assert len(check_tables(results, ["tiny"], conf, complete=False)) == 3


def test_two_records_of_one_row_and_seed_are_refused(conf: Path, results: Path) -> None:
    path = next((results / "records").glob("sft-*-s1-*.json"))
    record = read_record(path)
    train = record.asked["train"]
    asked = {**record.asked, "train": {**train, "sequence_length": float(train["sequence_length"])}}  # an equal number
    other = with_id(dataclasses.replace(record, asked=asked)).write(path.parent)
    assert other != path
    with refused(path.name, other.name, "sft", "seed 1"):
        check_tables(results, ["tiny"], conf)


# --- gates


def gated(conf: Path, seed: int, share: float) -> Record:
    """Return a composed run's record whose gates give `share` to the first expert, everywhere."""
    weights = [[1.0 - share, share, 0.0]] * 2
    gates = {name: {"mean": weights, "entropy": [0.5, 0.5]} for name in ("sums", "py", "prose")}
    return made(conf, "tiny", "mode-2x", seed, (0.5, 0.5, 0.5), gates=gates)


def test_gates_are_averaged_over_seeds_and_drawn_beside_the_table(conf: Path, tmp_path: Path) -> None:
    records = [gated(conf, 0, 0.2), gated(conf, 1, 0.6), made(conf, "tiny", "sft", 0, (0.5, 0.5, 0.5))]
    compiled = compile_table(load_table("tiny", conf), records, [], conf)
    line = compiled.line("mode-2x")
    assert line.branches[0] == "backbone"
    assert len(line.branches) == 3
    assert list(line.gates) == ["sums", "py", "prose"]
    for blocks in line.gates.values():
        assert blocks == [[pytest.approx(0.6), pytest.approx(0.4), 0.0]] * 2
    assert compiled.line("sft").gates == {}
    for record in records:
        record.write(tmp_path / "records")
    report("tiny", tmp_path, extra=conf)
    assert (tmp_path / "tiny-gates.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_without_gates_no_heat_map_is_drawn(conf: Path, results: Path) -> None:
    report("tiny", results, extra=conf)
    assert not (results / "tiny-gates.png").exists()


@pytest.mark.parametrize("asked", [(), ("table1",)])
def test_a_damaged_record_is_told_whatever_tables_are_asked_for(world: World, asked: tuple[str, ...]) -> None:
    path = world.root / "results" / "records" / "sft-py-s0-0123456789ab.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 1, "id"', encoding="utf-8")
    result = call(world, "report", *asked)
    assert result.exit_code == 2
    assert f"{path}: not a record that mode wrote" in result.output
