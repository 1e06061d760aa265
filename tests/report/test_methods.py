"""The table of methods follows the closed forms, on any backbone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mode.backbone.shape import read_shape
from mode.config.compose import compose
from mode.report.methods import MethodRow, layout_rows, render_methods, summarize_method


@pytest.mark.parametrize("backbone", ["tiny", "llama-135m"])
def test_costs_are_those_of_the_closed_form(backbone: str) -> None:
    given = [f"backbone={backbone}"]
    size = read_shape(compose(given).backbone).parameters
    rows = {name: summarize_method(name, given, None) for name in ("backbone", "sft", "lora", "ties", "btm")}
    lora: Any = (run := compose([*given, "method=lora"])).method
    cost = lora.cost(run)
    untouched: Any = (bare := compose([*given, "method=backbone"])).method
    forward = untouched.cost(bare).flops.forward
    passes = [1.0, 1.0, cost.flops.forward / forward, 1.0, 3.0]
    assert [row.passes for row in rows.values()] == pytest.approx(passes)
    assert [row.trained for row in rows.values()] == [0, size, cost.trainable, size, size]
    assert [row.active for row in rows.values()] == [size, size, size + cost.added, size, 3 * size]


def test_what_no_closed_form_says_is_a_dash() -> None:
    row = summarize_method("pretrain", [], None)
    assert (row.trained, row.active, row.passes) == (None, None, None)
    assert layout_rows([row])[-1].split()[:4] == ["pretrain", "–", "–", "–"]


def test_replay_counts_for_stages_that_train() -> None:
    given = ["train.batch.replay={english: 0.2}"]
    rows = [summarize_method(name, given, None) for name in ("sft", "ties", "wise-ft", "backbone")]
    assert [row.old_text for row in rows] == [("english",), (), ("english",), ()]


def test_settings_that_do_not_fit_a_method_leave_the_others() -> None:
    text = render_methods(["backbone.num_blocks=4"], None)
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert {name for name, line in lines.items() if "num_blocks=4" in line} == {"llama-pro", "mode", "mode-anchored"}


def test_a_family_of_its_own_has_a_heading() -> None:
    row = MethodRow("mine", "odd ones", "me", 1, 2, 1.0)
    lines = layout_rows([replace(row, name="sft", family="full tuning"), row, MethodRow("bare")])
    assert [line for line in lines[1:] if not line.startswith(" ")] == ["full tuning", "odd ones", "other"]
    assert [line.split()[0] for line in lines if line.startswith(" ")] == ["sft", "mine", "bare"]


@pytest.mark.slow
def test_rows_fit_a_terminal_on_large_backbones() -> None:
    text = render_methods(["backbone=llama-8b"], None)
    assert max(map(len, text.splitlines())) <= 80
