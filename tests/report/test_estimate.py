"""Costs that records do not hold are estimated by closed forms, and say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from mode.config.compose import compose
from mode.launch.schedule import forecast_table
from mode.records.record import Record
from mode.report.estimate import compile_in_full, count_sampling
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
