"""Runs end to end on the pico backbone: identity, skipping, needs, records."""

from __future__ import annotations

from mode import config
from mode.record import read_records
from mode.runner import execute, prepare_run
from tests.conftest import World


def test_compose_trains_each_expert_once_and_is_never_trained_twice(world: World) -> None:
    run = config.compose([*world.overrides, "method=mode"], world.conf)
    seen: list[str] = []
    record = execute(run, observe=lambda prepared, point: seen.append(prepared.id))
    stages = [prepare_run(stage).id for stage in run.method.needs(run)]  # type: ignore[attr-defined]
    assert record.provenance["needs"] == stages
    assert list(dict.fromkeys(seen)) == [*stages, record.id]
    seen.clear()
    assert execute(run, observe=lambda prepared, point: seen.append(prepared.id)) == record
    assert not seen
    assert {found.id for found in read_records(world.root / "results")} == {record.id, *stages}
