"""What a table says of its rows' routers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mode.records.record import Record
from mode.report.frames import make_routing_frame
from mode.tables.compile import RowResult, TableData, read_routing
from mode.tables.table import Row, Table


def record(**gates: Any) -> Record:
    asked = {"method": {"_target_": "baselines.btx.BTX"}, "targets": ["code"], "seed": 0, "train": {}, "evaluate": {}}
    happened = {
        **{"steps": 1, "tokens": 1, "seconds": 1.0, "split": "test", "scores": {}, "curve": []},
        "parameters": {"total": 1, "trainable": 1, "added": 0},
    }
    return Record(1, "a", asked, happened | {"gates": {"code": gates}}, {})


def test_routing_is_the_mean_over_layers_and_seeds_of_experts_in_use_and_evenness() -> None:
    even = record(mean=[[0.5, 0.5], [1.0, 0.0]], entropy=[math.log(2), 0.0], active=[2.0, 1.0])
    other = record(mean=[[0.5, 0.5], [0.5, 0.5]], entropy=[math.log(2), math.log(2)], active=[2.0, 2.0])
    assert read_routing([even]) == {"code": (1.5, pytest.approx(0.5))}
    assert read_routing([even, other]) == {"code": (1.75, pytest.approx(0.75))}
    old = record(mean=[[0.5, 0.5]], entropy=[math.log(2)])  # records of before do not say how many were in use
    assert read_routing([even, old]) == read_routing([]) == {}


def test_rows_without_routers_are_not_in_the_table_of_routers() -> None:
    table = Table(title="t", rows=(Row(name="a", label="A", overrides=()),))
    plain = RowResult(name="a", label="A", quality={}, resampled={}, documents={}, cost={})
    routed = RowResult(
        name="b",
        label="B",
        quality={},
        resampled={},
        documents={},
        cost={},
        branches=("x", "y"),
        routing={"code": (1.5, 0.5)},
    )
    compiled = TableData(
        table=table, lines=(plain, routed), domains=("code",), targets=("code",), split="test", left_out=0, overlap=()
    )
    frame = make_routing_frame(compiled)
    assert frame is not None
    assert frame.to_dict("records") == [{"Routers": "B", "Of": "2", "Code: in use": "1.50", "Code: evenness": "0.50"}]
    assert (
        make_routing_frame(
            TableData(table=table, lines=(plain,), domains=(), targets=(), split="test", left_out=0, overlap=())
        )
        is None
    )
