"""The time that runs take is estimated from records of equal runs, or from operations at the speed of similar ones."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from mode.config.compose import compose
from mode.config.identity import describe_run
from mode.launch.duration import Duration, estimate_duration
from mode.launch.table_runs import compose_table
from mode.records.record import Record, read_records
from mode.tables.select import remove_seed
from tests.support.refusals import refused

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Published records of plain fine-tuning."""
    return [record for record in read_records(RESULTS) if record.request.method_name == "SFT"]


def estimate(settings: Sequence[Sequence[str]], records: list[Record], jobs: int = 1) -> Duration:
    found = estimate_duration([compose(["method=sft", *each]) for each in settings], records, jobs)
    assert found is not None
    return found


def test_a_run_takes_what_records_with_its_settings_took(records: list[Record]) -> None:
    wanted = describe_run(compose(["method=sft"])) | {"backbone": {"name": "tiny"}}
    equal = [record for record in records if remove_seed(record.asked) == remove_seed(wanted)]
    assert len(equal) == 3
    found = estimate([["seed=17"]], equal)
    trained = statistics.median(record.outcome.seconds for record in equal)
    scored = statistics.median(record.outcome.evaluation_seconds or math.nan for record in records if record in equal)
    assert (found.runs, found.unknown, found.seconds) == (1, 0, pytest.approx(trained + scored))
    assert found.processor in {record.origin.machine["processor"] for record in equal}
    assert estimate([["seed=17"]], records) == estimate([["seed=3"]], records)


def test_other_settings_take_their_operations_at_the_speed_of_the_backbone(records: list[Record]) -> None:
    one, short, long = (estimate([[f"train.steps={steps}"]], records).seconds for steps in (1, 1001, 3001))
    assert (long - one) / (short - one) == pytest.approx(3.0)


def test_several_at_a_time_take_no_less_than_the_longest(records: list[Record]) -> None:
    longest = estimate([["train.steps=9000"]], records)
    several = estimate([["train.steps=100"], ["train.steps=101"], ["train.steps=9000"]], records, jobs=3)
    assert several == dataclasses.replace(longest, runs=3)


def test_what_no_record_tells_of_is_said(records: list[Record]) -> None:
    found = estimate([[], ["backbone=llama-14m"]], records)
    assert (found.runs, found.unknown) == (2, 1)
    assert estimate_duration([compose(["backbone=llama-14m"])], records, jobs=1) is None


def test_rows_are_executed_in_the_order_asked_for() -> None:
    runs = compose_table("table1", [0, 1], [], None, ["lora", "sft", "lora"])
    assert [(run.track.name, run.seed) for run in runs] == [("lora", 0), ("sft", 0), ("lora", 1), ("sft", 1)]
    with refused("table1", "lorra", suggestion="lora"):
        compose_table("table1", None, [], None, ["lorra"])
