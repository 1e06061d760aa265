"""Settings of tables are compared by their values, however they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from mode.core.errors import ConfigError
from mode.tables.table import Row, Table, check_fixed, compose_row, file_stem, list_rows_under

SPLIT = ("evaluate.split=validation", "++evaluate.split=validation", "evaluate.split='validation'")


def table(*overrides: str, rows: tuple[Row, ...] = ()) -> Table:
    return Table(title="T", rows=rows or (Row(name="a", label="A", overrides=("method=lora",)),), overrides=overrides)


@pytest.mark.parametrize("text", SPLIT)
def test_a_table_settles_settings_however_its_split_is_written(text: str) -> None:
    assert table(text).settles
    assert not table(text, "evaluate.split=test").settles
    assert not table().settles


@pytest.mark.parametrize("text", SPLIT)
def test_a_setting_of_the_table_itself_does_not_change_its_file(text: str) -> None:
    assert file_stem("lr", [text], ["evaluate.split=validation"]) == "lr"
    assert file_stem("lr", ["train.batch_size=4"]) == file_stem("lr", ["++train.batch.size=4"]) != "lr"
    assert file_stem("lr", ["++budget=data"]) == "lr-data"


@pytest.mark.parametrize("text", ["budget=data", "++budget='data'", "experiment=table1_smollm2_cpu"])
def test_a_row_with_a_budget_of_its_own_is_left_out_under_another(text: str) -> None:
    rows = (
        Row(name="a", label="A", overrides=("method=lora",)),
        Row(name="b", label="B", overrides=("method=lora", "++budget=compute")),
    )
    made = Table(title="T", rows=rows, budgets=("data",))
    assert [row.name for row in list_rows_under(made, [text])] == ["a"]
    assert list_rows_under(made, []) == rows


@pytest.mark.parametrize("text", ["seed=1", "++seed=1", "++method='lora'"])
def test_what_rows_set_themselves_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="table"):
        check_fixed([text])


def test_old_names_of_a_user_win_over_new_names_of_the_table(tmp_path: Path) -> None:
    made = table("train.batch.size=4")
    assert compose_row(made, made.rows[0], 0, ["train.batch_size=2"]).train.batch.size == 2
    with pytest.raises(ConfigError, match="is the same setting"):
        compose_row(made, made.rows[0], 0, ["train.batch_size=2", "train.batch.size=8"])


def test_a_row_has_further_settings_under_an_experiment_that_win_over_its_own() -> None:
    row = Row(
        name="sft", label="S", overrides=("method=sft", "method.lr=0.5"), under={"table1_long": ("method.lr=0.25",)}
    )
    made = Table(title="T", rows=(row,))

    def find_rate(overrides: list[str], table: Table = made) -> float:
        return compose_row(table, row, 0, overrides).lr

    assert find_rate([]) == 0.5
    assert find_rate(["experiment=table1_long"]) == 0.25
    assert find_rate(["experiment=table1_smollm2"]) == 0.5
    assert find_rate([], Table(title="T", rows=(row,), overrides=("experiment=table1_long",))) == 0.25
