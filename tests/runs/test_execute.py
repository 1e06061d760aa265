"""Runs end to end on the pico backbone: identity, skipping, needs, records."""

from __future__ import annotations

import pytest

from mode.config.compose import compose as compose_run
from mode.records.record import read_records
from mode.runs.execute import execute
from mode.runs.prepare import prepare_run
from tests.conftest import World
from tests.support.refusals import refused


@pytest.mark.slow
def test_compose_trains_each_expert_once_and_is_never_trained_twice(world: World) -> None:
    run = compose_run([*world.overrides, "method=mode"], world.conf)
    seen: list[str] = []
    record = execute(run, observe=lambda prepared, point: seen.append(prepared.id))
    stages = [prepare_run(stage).id for stage in run.method.needs(run)]  # type: ignore[attr-defined]
    assert record.provenance["needs"] == stages
    assert list(dict.fromkeys(seen)) == [*stages, record.id]
    seen.clear()
    assert execute(run, observe=lambda prepared, point: seen.append(prepared.id)) == record
    assert not seen
    assert {found.id for found in read_records(world.root / "results")} == {record.id, *stages}


@pytest.mark.slow
def test_a_stage_does_not_see_the_rows_that_the_mix_draws_from_its_domain(world: World) -> None:
    compose = compose_run([*world.overrides, "method=mode"], world.conf)
    orders = [prepare_run(run).method.order(run) for run in (compose, *prepare_run(compose).method.needs(compose))]
    assert len(set(orders)) == 3
    sft = compose_run([*world.overrides, "method=sft"], world.conf)
    assert prepare_run(sft).method.order(sft) == orders[0]


def test_a_stage_found_through_any_row_is_the_run_that_is_trained_on_its_own(world: World) -> None:
    narrow = [text for text in world.overrides if not text.startswith(("targets", "evaluate.domains"))]
    row = compose_run([*narrow, "targets=[prose,py]", "evaluate.domains=[py,sums]", "method=mode"], world.conf)
    stage = prepare_run(row).method.needs(row)[1]
    alone = [*narrow, "targets=[py]", "evaluate.domains=[py,sums]", "method.start=fresh", "method.num_experts=1"]
    assert prepare_run(stage).id == prepare_run(compose_run([*alone, "method=mode"], world.conf)).id


@pytest.mark.slow
def test_a_record_stays_as_it_is_when_its_weights_are_made_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = compose_run([*world.overrides, "method=sft"], world.conf)
    record = execute(run)
    (prepare_run(run).folder / "weights.safetensors").unlink()
    steps: list[int] = []
    assert execute(run, weights=True, observe=lambda prepared, point: steps.append(point["step"])) == record
    assert steps
    assert (prepare_run(run).folder / "weights.safetensors").exists()
    monkeypatch.setattr(
        "mode.runs.execute.describe_provenance", lambda *given, **named: record.provenance | {"date": "later"}
    )
    steps.clear()
    again = execute(run, again=True, observe=lambda prepared, point: steps.append(point["step"]))
    assert steps
    assert (again.id, again.provenance["date"]) == (record.id, "later")
    assert [found.provenance["date"] for found in read_records(world.root / "results")] == ["later"]


def test_how_often_is_logged_makes_no_other_run(world: World) -> None:
    runs = [
        compose_run([*world.overrides, "method=sft", f"train.checkpoint_every={every}"], world.conf) for every in (2, 4)
    ]
    assert len({prepare_run(run).id for run in runs}) == 1


@pytest.mark.slow
def test_a_truncated_expert_is_told_and_nothing_is_written(world: World) -> None:
    run = compose_run([*world.overrides, "method=mode"], world.conf)
    stage = prepare_run(prepare_run(run).method.needs(run)[0])
    execute(stage.run)
    file = stage.folder / "expert" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with refused(str(file)):
        execute(run)
    assert prepare_run(run).id not in {record.id for record in read_records(world.root / "results")}
    assert not (prepare_run(run).folder / "weights.safetensors").exists()
