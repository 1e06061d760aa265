"""Costs that records do not hold are estimated by closed forms, and say so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from mode.config.compose import compose
from mode.launch.table_runs import forecast_table
from mode.records.record import Record
from mode.report.estimate import compile_in_full, count_sampling, count_tried
from mode.report.frames import make_cost_frame
from mode.tables.table import load_table
from tests.conftest import World
from tests.report.test_report import conf, made, records  # noqa: F401


def test_operations_that_records_lack_are_those_of_the_forecast(conf: Path, records: list[Record]) -> None:  # noqa: F811
    counted = made(conf, "tiny", "sft", 0, (0.5, 0.6, 0.4), flops=7e12)
    others = [record for record in records if record.id != counted.id]
    compiled = compile_in_full(load_table("tiny", conf), [counted, *others], [], conf)
    assert compiled.line("sft").cost["flops"] == 7.0
    assert compiled.line("sft").estimated == {"active"}
    forecasts = forecast_table("tiny", [], conf)
    for name, label in (("lora", "LoRA & 100%_x"), ("mode-2x", "MoDE 2x")):
        line, stages = compiled.line(name), forecasts[label]
        assert stages is not None
        assert line.cost["flops"] == pytest.approx(sum(stage.flops for stage in stages) / 1e12)
        assert line.cost["active"] == stages[-1].active / 1e6
        assert line.estimated == {"flops", "active"}
    assert len(forecasts["MoDE 2x"] or ()) == 3
    frame = make_cost_frame(compiled).set_index("Cost")
    assert frame.loc["MoDE 2x", "Active M"].startswith("≈")
    assert not frame.loc["Backbone", "TFLOPs"].startswith("≈")  # none are none
    assert frame.loc["MoDE frozen"].tolist() == ["–"] * len(frame.columns)  # there is no record


def test_sampling_is_a_forward_pass_over_every_row(world: World) -> None:
    asked = [*world.overrides, "method=sft", "method.anchor.source=self", "method.anchor.rows=8"]
    run = compose(asked, world.conf)
    found = count_sampling(run)
    assert count_sampling(compose([*asked, "method.anchor.rows=16"], world.conf)) == 2 * found
    assert count_sampling(compose([*world.overrides, "method=sft"], world.conf)) == 0.0
    untouched = run.method.anchoring_flops(run) / run.method.anchor.share  # type: ignore[attr-defined]
    assert found == 8 * run.train.sequence_length * untouched


def test_the_settings_that_a_row_was_chosen_from_are_counted_once(conf: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(conf, tmp_path / "conf")
    path = tmp_path / "conf" / "table" / "tiny.yaml"
    table = yaml.safe_load(path.read_text("utf-8"))
    rows = {row["name"]: row for row in table["rows"]}
    rows["sft"]["chosen_in"] = ["choices/sft", "choices/sft"]
    rows["lora"]["chosen_in"] = ["choices/lora"]
    rows["mode-2x"]["chosen_in"] = ["choices/lora", "choices/sft"]
    path.write_text(yaml.safe_dump(table, sort_keys=False), "utf-8")
    scores = (0.5, 0.6, 0.4)
    tried = [made(conf, "choices", row, 0, scores) for row in ("sft@lr0.001", "sft@lr0.01", "lora@lr0.1")]
    shown = [made(conf, "tiny", row, 0, scores) for row in ("backbone", "sft", "lora", "mode-2x")]
    compiled = compile_in_full(load_table("tiny", tmp_path / "conf"), [*tried, *shown], [], tmp_path / "conf")
    found = count_tried(["choices/sft"], lambda name: None)  # a table that is not for this budget
    assert found == 0
    assert {line.name: line.cost.get("tried") for line in compiled.lines} == {
        "backbone": None,
        "sft": 2.0,
        "lora": 1.0,
        "mode-2x": 3.0,
        "mode-2x-frozen": None,
    }
