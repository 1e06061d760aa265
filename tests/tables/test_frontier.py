"""Frontiers: what a method reaches over its settings at every tolerated loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mode.report.frames import make_frontier_frame
from mode.report.text import describe_divergence, render_csv
from mode.tables.compile import RowResult, TableData
from mode.tables.frontier import FEWEST_RANKED, correlate_divergence, find_leader, list_frontiers
from mode.tables.table import Row, Table

POINTS = {  # name: target accuracy and retention
    "backbone": (40.0, 0.0),
    "a@1": (42.0, -0.5),
    "a@2": (46.0, -4.0),
    "a@3": (44.0, -6.0),
    "b@1": (39.0, 0.0),
    "b@2": (50.0, -20.0),
    "c@1": (None, None),
}


def compile_points(noise: float = 0.01) -> TableData:
    """Return a table of rows with given points; the resamples of rows differ by independent noise."""
    lines = []
    for seed, (name, (target, kept)) in enumerate(POINTS.items()):
        has = target is not None
        drawn = np.random.default_rng(seed).normal(0.0, noise, 100)
        lines.append(
            RowResult(
                name,
                f"Method {name[0].upper()}, setting {name[-1]}",
                quality={0: {"target": target, "retention": kept}} if has else {},
                resampled={0: {"target": target + drawn}} if has else {},
                documents={"target": 30.0},
                cost={"n": float(has)},
            )
        )
    rows = tuple(Row(name=line.name, label=line.label, overrides=()) for line in lines)
    table = Table(title="T", rows=rows, frontiers=True)
    return TableData(table, tuple(lines), ("x", "y"), ("x",), "validation", 0, ())


def test_the_best_setting_is_the_best_of_those_that_keep_enough_and_gain() -> None:
    a, b, c = list_frontiers(compile_points())
    assert [(each.method, each.label, each.settings, len(each.rows)) for each in (a, b, c)] == [
        ("a", "Method A", 3, 3),
        ("b", "Method B", 2, 2),
        ("c", "Method C", 1, 0),
    ]
    found = {loss: getattr(a.find_best(loss), "name", None) for loss in (0.4, 0.5, 3.9, 4.0, 30.0)}
    assert found == {0.4: None, 0.5: "a@1", 3.9: "a@1", 4.0: "a@2", 30.0: "a@2"}
    assert b.find_best(2.0) is None  # its one setting that keeps enough is below the backbone
    assert c.find_best(2.0) is None


def test_the_mean_gain_is_the_area_under_the_steps() -> None:
    a, b, c = list_frontiers(compile_points())
    assert a.mean_gain == pytest.approx((3.5 * 2.0 + 6.0 * 6.0) / 10.0)
    assert b.mean_gain == c.mean_gain == 0.0


def test_who_leads_is_ahead_of_all_beyond_noise() -> None:
    frontiers = list_frontiers(compile_points())
    assert find_leader(frontiers, 2.0) is None  # there is nobody to be ahead of
    leader = find_leader(frontiers, 20.0)
    assert leader is not None
    assert leader.method == "b"
    assert find_leader(list_frontiers(compile_points(noise=10.0)), 20.0) is None


def test_only_tables_that_ask_for_them_show_frontiers() -> None:
    frame = make_frontier_frame(compile_points(), strong="*{}*")
    assert frame is not None
    assert frame["Settings"].tolist() == ["3 of 3", "2 of 2", "0 of 1"]
    assert frame["Targets at −2"].tolist() == ["42.00", "–", "–"]
    assert frame["Mean gain to −10"].tolist() == ["4.30", "0.00", "–"]
    compiled = compile_points()
    plain = TableData(Table(title="T", rows=compiled.table.rows), *list(vars(compiled).values())[1:])
    assert make_frontier_frame(plain) is None


def test_divergence_is_ranked_against_retention_where_enough_settings_have_both() -> None:
    lines = [
        RowResult(f"a@{n}", f"A, {n}", {0: {"retention": -float(n)}}, {}, {}, {"divergence": float(n**2)})
        for n in range(FEWEST_RANKED)
    ]
    few = replace(compile_points(), lines=tuple(lines[1:]))
    assert correlate_divergence(few) is None
    assert describe_divergence(few) == []
    found = replace(few, lines=tuple(lines))
    assert correlate_divergence(found) == (pytest.approx(-1.0), FEWEST_RANKED)
    swapped = [replace(lines[0], cost={"divergence": 1.5}), *lines[1:]]  # 0, 1, 4 becomes 1.5, 1, 4
    assert correlate_divergence(replace(few, lines=tuple(swapped))) == (pytest.approx(-1 + 6 * 2 / 504), FEWEST_RANKED)
    assert "-1.00" in describe_divergence(found)[0]
    backbone = RowResult("backbone", "B", {0: {"retention": 0.0}}, {}, {}, {"divergence": 9.0})
    assert correlate_divergence(replace(found, lines=(*lines, backbone))) == correlate_divergence(found)
    assert "all rows,divergence/retention,-1," in render_csv(found)
    assert describe_divergence(replace(found, targets=())) == []


def test_rows_with_gates_can_be_left_out_of_the_ranks() -> None:
    lines = [
        RowResult(f"a@{n}", f"A, {n}", {0: {"retention": -float(n)}}, {}, {}, {"divergence": float(n)})
        for n in range(FEWEST_RANKED)
    ]
    far = {"divergence": 99.0}
    gated = RowResult("b@0", "B", {0: {"retention": 0.0}}, {}, {}, far, gates={"code": ((0.5, 0.5),)})
    found = replace(compile_points(), lines=(*lines, gated))
    assert correlate_divergence(found, gated=False) == (pytest.approx(-1.0), FEWEST_RANKED)
    everything = correlate_divergence(found)
    assert everything is not None
    assert everything[0] > -0.5
    assert "rows without gates,divergence/retention,-1," in render_csv(found)
