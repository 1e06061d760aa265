"""What every method inherits and states: the mix it trains on, its family and its publication."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.config.groups import list_own_members
from mode.methods.base import FAMILIES, Method
from mode.runs.execute import execute
from mode.runs.prepare import prepare_run
from tests.conftest import World
from tests.support.refusals import refused


def mixture(world: World, *overrides: str) -> dict[str, int]:
    method: Any = (run := compose([*world.overrides, *overrides], world.conf)).method
    assert isinstance(method, Method)
    return method.mixture(run)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), {"py": 1, "sums": 1}),
        (("train.batch.replay={prose: 0.2}",), {"py": 2, "sums": 2, "prose": 1}),
        (("train.batch.replay={prose: 0.125}",), {"py": 7, "sums": 7, "prose": 2}),
        (("train.batch.replay={prose: 0.5}",), {"py": 1, "sums": 1, "prose": 2}),
        (("targets=[py]", "train.batch.replay={prose: 0.25, sums: 0.25}"), {"py": 2, "prose": 1, "sums": 1}),
    ],
)
def test_targets_share_equally_what_replay_leaves(
    world: World, overrides: tuple[str, ...], expected: dict[str, int]
) -> None:
    given = [text for text in overrides if not text.startswith("targets=")]
    world_targets = [text for text in overrides if text.startswith("targets=")]
    assert mixture(world, *world_targets, *given) == expected


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("train.batch.replay={py: 0.2}",), ("train.batch.replay", "py", "targets=['py', 'sums']")),
        (("train.batch.replay={porse: 0.2}",), ("domain porse", "prose?")),
        (("train.batch.replay={prose: 1.0}",), ("train.batch.replay.prose=1.0", "1")),
        (("train.batch.replay={prose: 0.6, py: 0.5}", "targets=[sums]"), ("replay", "targets")),
        (("train.batch.replay={prose: 0.005}",), ("replay", "100", "0.125")),
        (("train.batch.examples=0",), ("train.batch.examples=0",)),
    ],
)
def test_a_mix_that_cannot_be_is_refused(world: World, overrides: tuple[str, ...], named: tuple[str, ...]) -> None:
    with refused(*named):
        compose([*world.overrides, *overrides], world.conf)


@pytest.mark.slow
def test_replay_is_scored_and_belongs_to_the_mix_alone(world: World) -> None:
    run = compose(
        [*world.overrides, "method=mode", "train.batch.replay={prose: 0.2}", "train.batch.examples=10"], world.conf
    )
    stages = run.method.needs(run)  # type: ignore[attr-defined]
    assert [(stage.train.batch.replay, stage.train.batch.examples) for stage in stages] == [(None, None)] * 2
    plain = compose([*world.overrides, "method=mode"], world.conf)
    assert stages == plain.method.needs(plain)  # type: ignore[attr-defined]
    record = execute(replace_settings(run, method=compose([*world.overrides, "method=sft"], world.conf).method))
    assert "prose" in record.happened["scores"]
    assert record.asked["train"]["replay"] == {"prose": 0.2}
    assert record.asked["targets"] == ["py", "sums"]


def test_the_order_in_which_replay_is_written_makes_no_other_run(world: World) -> None:
    given = ("targets=[py]", "method=sft")
    one, other = (
        compose([*world.overrides, *given, f"train.batch.replay={text}"], world.conf)
        for text in ("{prose: 0.2, sums: 0.1}", "{sums: 0.1, prose: 0.2}")
    )
    assert prepare_run(one).id == prepare_run(other).id
    assert list(mixture(world, *given, "train.batch.replay={prose: 0.2, sums: 0.1}")) == ["py", "prose", "sums"]
    none, empty = (compose([*world.overrides, f"train.batch.replay={text}"], world.conf) for text in ("null", "{}"))
    assert none == empty


@pytest.mark.parametrize("name", list_own_members("method"))
def test_every_method_has_a_family_and_a_source(name: str) -> None:
    method: Any = compose([f"method={name}"]).method
    assert method.family not in ("", Method.family)
    assert method.source
    about = " ".join((sys.modules[type(method).__module__].__doc__ or "").split())
    authors, _, year = method.source.rpartition(", ")
    assert not authors or authors.startswith("Schafhalter") or f"{authors}, {year}" in about


def test_every_family_has_a_method() -> None:
    methods: list[Any] = [compose([f"method={name}"]).method for name in list_own_members("method")]
    assert {method.family for method in methods} >= set(FAMILIES)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("method=task-arithmetic",), "Ilharco"),
        (("method=ties",), "Yadav"),
        (("method=ties", "method.drop=0.5"), "Yu"),
        (("method=mode", "method.num_experts=3"), "Schafhalter"),
        (("method=mode", "method.head_rank=4"), "this project"),
        (("method=mode", "method.anchor.source=self"), "this project"),
    ],
)
def test_the_source_follows_the_settings(overrides: tuple[str, ...], expected: str) -> None:
    method: Any = compose(overrides).method
    assert method.source.startswith(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("method=sft",), ()),
        (("method=sft", "train.batch.replay={prose: 0.2}"), ("prose",)),
        (("method=mode-anchored",), ("self",)),
        (("method=mode", "method.anchor.source=prose"), ("prose",)),
        (("method=ewc", "train.batch.replay={prose: 0.2}"), ("prose", "self")),
        (("method=cbtm-branch", "train.batch.replay={prose: 0.2}"), ()),
        (("method=pretrain",), ()),
    ],
)
def test_old_text_is_what_training_reads_beside_the_targets(
    world: World, overrides: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    method: Any = (run := compose([*world.overrides, *overrides], world.conf)).method
    assert method.old_text(run) == expected


@pytest.mark.parametrize(
    ("method", "stage"),
    [("btm", "branch"), ("wise-ft", "tuned"), ("mole", "experts"), ("flex-olmo", "expert"), ("rho-1", "reference")],
)
def test_a_wrong_setting_of_an_earlier_stage_is_named_in_full(method: str, stage: str) -> None:
    with refused(f"method.{stage}.lr=-1"):
        run = compose([f"method={method}", f"method.{stage}.lr=-1"])
        run.method.needs(run)
