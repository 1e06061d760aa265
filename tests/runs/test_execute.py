"""Runs end to end on the pico backbone: identity, skipping, needs, records."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mode.artefacts.find import find_expert_folder, find_run
from mode.config.compose import compose as compose_run
from mode.records.record import read_records
from mode.runs.execute import WEIGHTS, execute, restore
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


def swap(one: Path, other: Path) -> None:
    """Exchange two files or folders."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.slow
def test_a_run_is_not_taken_for_another_whose_files_are_in_its_folder(world: World) -> None:
    first, second = (
        prepare_run(compose_run([*world.overrides, "method=lora", f"seed={seed}"], world.conf)) for seed in (0, 1)
    )
    for prepared in (first, second):
        execute(prepared.run)
    assert restore(first)
    assert find_run(first.id, first.folder.parent).seed == 0
    swap(first.folder / WEIGHTS, second.folder / WEIGHTS)
    for prepared, other in ((first, second), (second, first)):
        with refused(str(prepared.folder / WEIGHTS), prepared.id, other.id):
            restore(prepared)
    swap(first.folder, second.folder)  # now both have their own weights and the other's settings
    swap(first.folder / WEIGHTS, second.folder / WEIGHTS)
    for prepared, other in ((first, second), (second, first)):
        with refused(str(prepared.folder), other.id):
            find_run(prepared.id, prepared.folder.parent)


@pytest.mark.slow
def test_an_expert_of_another_seed_is_not_composed(world: World) -> None:
    runs = [compose_run([*world.overrides, "method=mode", f"seed={seed}"], world.conf) for seed in (0, 1)]
    stages = [prepare_run(prepare_run(run).method.needs(run)[0]) for run in runs]
    for stage in stages:
        execute(stage.run)
    swap(stages[0].folder / "expert", stages[1].folder / "expert")
    with refused(str(stages[0].folder / "expert"), stages[0].id, stages[1].id):
        execute(runs[0])
    assert prepare_run(runs[0]).id not in {record.id for record in read_records(world.root / "results")}
    with refused(str(stages[0].folder / "expert"), stages[1].id):
        find_expert_folder(stages[0].id, stages[0].folder.parent, ())


@pytest.mark.slow
def test_a_given_expert_that_changes_while_earlier_stages_train_is_refused(world: World, tmp_path: Path) -> None:
    given = ["method=mode", "method.start=fresh", "method.num_experts=1", "targets=[py]"]
    folders = []
    for seed in (0, 1):
        stage = prepare_run(compose_run([*world.overrides, *given, f"seed={seed}"], world.conf))
        execute(stage.run)
        folders.append(stage.folder / "expert")
    shutil.copytree(folders[0], tmp_path / "expert")
    run = compose_run([*world.overrides, "method=mode", f"method.experts=['{tmp_path}/expert']"], world.conf)

    def exchange(prepared: object, point: object) -> None:
        shutil.rmtree(tmp_path / "expert")
        shutil.copytree(folders[1], tmp_path / "expert")

    with refused("method.experts", "py"):
        execute(run, observe=exchange)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["btx", "btm", "cbtm", "mole"])
def test_methods_with_earlier_stages_check_their_weights(world: World, name: str) -> None:
    run = compose_run([*world.overrides, f"method={name}"], world.conf)
    stages = [prepare_run(stage) for stage in prepare_run(run).method.needs(run)]
    for stage in stages:
        execute(stage.run)
    swap(stages[0].folder / WEIGHTS, stages[1].folder / WEIGHTS)
    with refused(str(stages[0].folder / WEIGHTS), stages[1].id):
        execute(run)
    swap(stages[0].folder / WEIGHTS, stages[1].folder / WEIGHTS)
    assert execute(run).outcome.scores


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


@pytest.mark.slow
def test_a_run_is_scored_on_the_part_and_in_the_precision_that_it_asks_for(world: World) -> None:
    whole = compose_run([*world.overrides, "method=backbone"], world.conf)
    asked = [*world.overrides, "method=backbone", "evaluate.tokens=64", "evaluate.precision=bf16"]
    part = compose_run(asked, world.conf)
    records = [execute(run) for run in (whole, part)]
    assert records[0].id != records[1].id
    assert [record.request.scoring for record in records] == ["fp32", "bf16"]
    for name, score in records[1].outcome.scores.items():
        other = records[0].outcome.scores[name]
        assert 0 < score.tokens <= 64 < other.tokens  # two rows of 32, of which the last of a split is shorter
        assert len(score.document_tokens) == len(other.document_tokens)
    same = compose_run([*world.overrides, "method=backbone", "evaluate.precision=bf16"], world.conf)
    for name, score in execute(same).outcome.scores.items():
        other = records[0].outcome.scores[name]
        assert score.tokens == other.tokens
        assert score.loss != other.loss
        assert score.loss == pytest.approx(other.loss, rel=1e-2)
