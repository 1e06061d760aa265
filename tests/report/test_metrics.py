"""Tables show the metrics that are chosen, and read their direction from the metric's declaration."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cli.app import app
from mode.core.errors import ConfigError
from mode.records.record import Record
from mode.report.render import check_tables, report
from mode.report.text import render_csv, render_markdown
from mode.tables.compile import TableData, compile_table
from mode.tables.findings import list_findings
from mode.tables.table import Claim, load_table
from tests.report.test_report import conf, made, parsed  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("composed_once")

LOSSES = {"backbone": (3.0, 3.0, 2.0), "sft": (1.5, 1.25, 2.5), "lora": (1.0, 2.0, 2.25)}
"""Loss on sums, py and prose, in nats per token."""


def with_losses(record: Record, losses: tuple[float, ...], *, by_document: bool = True) -> Record:
    """Return a record that holds losses, and their sums over documents."""
    scores = {}
    for (name, score), loss in zip(record.happened["scores"].items(), losses, strict=True):
        more: dict[str, Any] = {"loss": loss, "bytes": 16 * 10**7}
        sums = {"document_nll": [10**7 * loss] * 8} if by_document else {}
        scores[name] = score | more | sums
    return dataclasses.replace(record, happened={**record.happened, "scores": scores})


def compiled(conf: Path, *metrics: str, by_document: bool = True, **changes: Any) -> TableData:  # noqa: F811
    """Return a table of three rows whose losses are known."""
    records = [
        with_losses(made(conf, "tiny", row, 0, (0.5, 0.5, 0.5)), losses, by_document=by_document)
        for row, losses in LOSSES.items()
    ]
    table = dataclasses.replace(load_table("tiny", conf, metrics), differences=(("sft", "lora"),), **changes)
    return compile_table(table, records, [], conf)


def test_columns_are_those_of_the_metrics_chosen_in_their_order(conf: Path) -> None:  # noqa: F811
    heads = list(parsed(render_markdown(compiled(conf, "loss", "accuracy")))["SFT"])
    assert heads[:11] == [
        *("Method", "Sums, loss", "Py, loss", "Prose, loss", "Average, loss", "Retention, loss"),
        *("Sums", "Py", "Prose", "Average", "Retention"),
    ]


def test_where_lower_is_better_the_lowest_is_bold_and_retention_is_the_change(conf: Path) -> None:  # noqa: F811
    table = parsed(render_markdown(compiled(conf, "loss")))
    assert table["LoRA & 100%_x"]["Sums, loss"] == "**1.000**"
    assert table["SFT"]["Py, loss"] == "**1.250**"
    assert table["Backbone"]["Prose, loss"] == "**2.000**"
    assert table["SFT"]["Sums, loss"] == "1.500"
    assert table["SFT"]["Retention, loss"] == "+0.500"
    assert table["SFT − LoRA & 100%_x"]["Sums, loss"] == "**+0.500**"


def test_bits_per_byte_follow_from_the_loss_and_the_bytes(conf: Path) -> None:  # noqa: F811
    table = parsed(render_markdown(compiled(conf, "bits-per-byte")))
    # 8000 tokens of 1.5 nats are 17312 bits; over 16000 bytes that is 1.082.
    assert table["SFT"]["Sums, bits per byte"] == "1.082"


def test_without_sums_over_documents_nothing_is_bold_and_the_table_says_so(conf: Path) -> None:  # noqa: F811
    found = compiled(conf, "loss", by_document=False)
    text = render_markdown(found)
    assert "**" not in text
    assert "Records without loss by document: backbone, sft, lora." in text
    assert parsed(text)["SFT − LoRA & 100%_x"]["Sums, loss"] == "+0.500"
    (row,) = [
        each for each in csv.DictReader(io.StringIO(render_csv(found)))
        if (each["row"], each["column"]) == ("sft - lora", "sums/loss")
    ]  # fmt: skip
    assert (row["mean"], row["low"], row["high"]) == ("0.5", "", "")


def test_a_metric_that_no_record_holds_is_a_dash(conf: Path) -> None:  # noqa: F811
    text = render_markdown(compiled(conf, "top-5-accuracy"))
    assert parsed(text)["SFT"]["Sums, top-5 accuracy"] == "–"
    assert "Records without top-5 accuracy (–): backbone, sft, lora." in text


@pytest.mark.parametrize(
    ("ours", "theirs", "says"), [("lora", "sft", "it holds here"), ("sft", "lora", "the opposite holds here")]
)
def test_a_claim_about_the_loss_holds_where_it_is_lower(conf: Path, ours: str, theirs: str, says: str) -> None:  # noqa: F811
    claim = Claim(text="Ahead.", ours=ours, theirs=theirs, column="sums/loss")
    (sentence,) = list_findings(compiled(conf, claims=(claim,)))
    assert sentence.endswith(f": {says}.")
    assert " on Sums, loss " in sentence


@pytest.mark.slow
def test_a_table_with_other_metrics_has_a_file_of_its_own(conf: Path, tmp_path: Path) -> None:  # noqa: F811
    for row, losses in LOSSES.items():
        with_losses(made(conf, "tiny", row, 0, (0.5, 0.5, 0.5)), losses).write(tmp_path / "records")
    report("tiny", tmp_path, extra=conf)
    usual = (tmp_path / "tiny.md").read_bytes()
    given = ["report", "tiny", "--metric", "loss", f"paths.results={tmp_path}", "--conf", str(conf)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.stderr
    assert "Sums, loss" in (tmp_path / "tiny-loss.md").read_text("utf-8")
    assert (tmp_path / "tiny.md").read_bytes() == usual
    assert check_tables(tmp_path, ["tiny"], conf) == []


def test_a_tables_yaml_chooses_metrics_and_a_wrong_one_is_refused_in_one_line(conf: Path) -> None:  # noqa: F811
    plain = yaml.safe_load((conf / "table" / "tiny.yaml").read_text("utf-8"))
    path = conf / "table" / "measured.yaml"
    path.write_text(yaml.safe_dump(plain | {"metrics": ["accuracy", "bits-per-byte"]}), encoding="utf-8")
    assert load_table("measured", conf).metrics == ("accuracy", "bits-per-byte")
    path.write_text(yaml.safe_dump(plain | {"metrics": ["bits-per-bite"]}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^table/measured: metric bits-per-bite: .* did you mean bits-per-byte\?$"):
        load_table("measured", conf)
    path.unlink()


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--metric", "los"], "did you mean loss?"), (["--metric", "loss", "--check"], "not with --check")],
)
def test_a_wrong_metric_on_the_command_line_is_one_line(words: list[str], named: str) -> None:
    done = CliRunner().invoke(app, ["report", "table1", *words])
    assert done.exit_code == 2
    assert done.stderr.startswith("mode: ")
    assert done.stderr.endswith(f"{named}\n")
    assert done.stderr.count("\n") == 1
