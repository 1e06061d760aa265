"""Seconds of a table are those of rows that were timed under the same conditions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mode.records.record import Record
from mode.report.frames import make_frame
from mode.report.text import write_notes
from mode.tables.compile import TableData, compile_table
from mode.tables.table import load_table
from mode.tables.timing import find_untimed
from tests.report.test_report import conf, made  # noqa: F401  # a fixture

SCORES = (0.5, 0.6, 0.4)
PLACE = {"machine": {"processor": "P"}, "threads": 1, "commit": "c", "versions": {"torch": "2"}}


def compile_rows(conf: Path, **places: dict[str, Any]) -> TableData:  # noqa: F811
    def place(row: str) -> Record:
        record = made(conf, "tiny", row, 0, SCORES)
        return replace(record, provenance={**record.provenance, **PLACE, **places.get(row, {})})

    return compile_table(
        load_table("tiny", conf), [place(row) for row in ("backbone", "sft", "lora", "mode-2x")], [], conf
    )


def test_rows_timed_alike_have_seconds(conf: Path) -> None:  # noqa: F811
    compiled = compile_rows(conf)
    assert compiled.untimed == ()
    assert all("seconds" in compiled.line(name).cost for name in ("backbone", "sft", "lora", "mode-2x"))
    assert not any("`mode bench` compares" in line for line in write_notes(compiled))


def test_another_machine_or_version_has_a_dash_and_the_note_says_why(conf: Path) -> None:  # noqa: F811
    for change in ({"machine": {"processor": "Q"}}, {"threads": 2}, {"commit": "d"}, {"versions": {"torch": "3"}}):
        compiled = compile_rows(conf, lora=change)
        assert compiled.untimed == ("lora",)
        shown = make_frame(compiled).set_index("Method")["Seconds"]
        assert shown[compiled.line("lora").label] == "–"
        assert shown[compiled.line("sft").label] == "10"
        assert "rate" not in compiled.line("lora").cost
        assert any("dash: lora." in line for line in write_notes(compiled))


def test_what_trains_nothing_takes_no_time_anywhere(conf: Path) -> None:  # noqa: F811
    compiled = compile_rows(conf, backbone={"commit": "other"})
    assert compiled.untimed == ()
    assert compiled.line("backbone").cost["seconds"] == 0


def test_rows_of_several_conditions_have_no_time() -> None:
    assert find_untimed({"a": {"x"}, "b": {"x", "y"}, "c": set()}) == ("b",)
    assert find_untimed({"a": {"x", "y"}}) == ("a",)
    assert find_untimed({}) == ()
