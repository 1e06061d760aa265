"""Contamination is what a count with sets says, of every training split and of the backbone's pretraining."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from mode.config.compose import compose
from mode.data import contamination as module
from mode.data.contamination import PRETRAINING, measure_contamination, measure_seen_share
from mode.runs.execute import execute
from mode.runs.prepare import prepare_run
from tests.conftest import World


def naive_share(texts: list[list[int]], scored: list[int], n: int) -> float:
    known = {tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)}
    grams = [tuple(scored[i : i + n]) for i in range(len(scored) - n + 1)]
    return sum(gram in known for gram in grams) / len(grams)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("n", [2, 3, 13])
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_a_share_equals_a_count_with_sets(dtype: type, n: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    rng = random.Random(n)
    texts = [[rng.randrange(6) for _ in range(length)] for length in (300, 90, n, n - 1)]
    scored = [rng.randrange(6) for _ in range(150)] + texts[0][100:180] + texts[1][:40] + [65535] * 5
    expected = naive_share(texts, scored, n)
    assert 0.0 < expected < 1.0
    found = measure_seen_share([np.array(text, dtype) for text in texts], np.array(scored, dtype), n)
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_share_uses_thirteen_tokens_and_is_zero_for_less() -> None:
    stream = np.arange(30, dtype=np.uint16)
    assert measure_seen_share([stream], stream[5:18]) == 1.0
    assert measure_seen_share([stream], stream[5:17]) == 0.0
    assert measure_seen_share([stream[:12]], stream) == 0.0
    assert measure_seen_share([stream], stream[::-1].copy()) == 0.0


@pytest.mark.slow
def test_every_training_split_and_the_pretraining_are_compared_with_what_is_scored(world: World) -> None:
    packed = prepare_run(compose(world.overrides, world.conf)).packed
    known = {name: packed[name].fingerprint for name in ("py", "prose")}
    found = measure_contamination(packed, "test", known)

    def tokens(name: str, split: str) -> list[int]:
        return [int(token) for token in packed[name].split(split).tokens]  # type: ignore[arg-type]

    for name in packed:
        scored = tokens(name, "test")
        for other in packed:
            assert found[name][other] == pytest.approx(naive_share([tokens(other, "train")], scored, 13))
        before = [tokens(other, "pretrain") for other in known]
        assert found[name][PRETRAINING] == pytest.approx(naive_share(before, scored, 13))
    assert (found["py"]["py"] or 0.0) > 0.0 == found["py"]["prose"]
    assert measure_contamination(packed, "test", known) == found  # from what was kept


@pytest.mark.parametrize("known", [{}, {"py": "another"}, {"nowhere": "else"}])
def test_what_the_backbone_saw_is_not_known_where_it_is_not_here(world: World, known: dict[str, str]) -> None:
    packed = prepare_run(compose(world.overrides, world.conf)).packed
    assert {shares[PRETRAINING] for shares in measure_contamination(packed, "test", known).values()} == {None}


def test_a_record_says_what_of_the_scored_split_was_seen(shared_world: World, tmp_path: Path) -> None:
    world = shared_world.at(tmp_path)
    run = compose([*world.overrides, "method=backbone", "evaluate.split=validation"], world.conf)
    told = execute(run).happened["contamination"]
    assert told == measure_contamination(prepare_run(run).packed, "validation", {})
    assert told != measure_contamination(prepare_run(run).packed, "test", {})
