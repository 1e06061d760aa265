"""Rows in which the domain changes: their segments, the scores by distance, and the reports."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mode.config.compose import compose
from mode.data.pack import PackedSplit
from mode.downstream.mixed import count_by_distance, find_row_hits, make_mixed_rows
from mode.downstream.mixed_results import COLLECTION, MixedResult, label_results
from mode.evaluation.next_token import score_stream
from mode.runs.execute import execute, restore
from mode.runs.prepare import prepare_run
from tests.cli.test_cli import call
from tests.conftest import World
from tests.support.refusals import refused

LONG_ROWS = ("train.sequence_length=128",)


@pytest.mark.parametrize(("domains", "segment", "row"), [(3, 4, 16), (2, 3, 11), (3, 2, 4), (4, 5, 30)])
def test_changes_are_equally_frequent_and_segments_are_pieces_of_the_streams(
    domains: int, segment: int, row: int
) -> None:
    streams = [1000 * number + np.arange(200 + 50 * number) for number in range(domains)]
    made = make_mixed_rows(streams, segment, row)
    places = row // segment
    assert made.tokens.shape == (len(made.domains), places * segment)
    segments = made.tokens.reshape(-1, segment)
    assert (segments // 1000 == made.domains.reshape(-1, 1)).all()
    assert (np.diff(segments) == 1).all()
    assert len(set(made.tokens.flat)) == made.tokens.size  # every token once
    for number in range(domains):
        mine = made.offsets[made.domains == number]
        assert mine.tolist() == list(range(1, 1 + segment * len(mine), segment))
    changes = Counter(zip(made.domains[:, :-1].flat, made.domains[:, 1:].flat, strict=True))
    assert len(set(changes.values())) == 1
    if domains <= 3:
        assert len(changes) == domains * (domains - 1)
    assert {tuple(np.bincount(place, minlength=domains)) for place in made.domains.T} == {
        (len(made.domains) // domains,) * domains
    }


def test_rows_without_room_for_two_segments_and_short_streams_are_refused() -> None:
    with refused("31", "16"):
        make_mixed_rows([np.arange(500)] * 2, 16, 31)
    with refused("3 segments of 8 tokens", "4"):
        make_mixed_rows([np.arange(500), np.arange(32)], 8, 16)


@pytest.mark.parametrize("bos", [None, 7])
def test_scored_tokens_are_counted_by_distance_and_document(bos: int | None) -> None:
    random = np.random.default_rng(0)
    splits = {}
    for name in ("a", "b"):
        starts = np.array([0, 30, 31, 90, 130])
        tokens = random.integers(10, 99, 130)
        if bos is not None:
            tokens[starts[:-1]] = bos
        splits[name] = PackedSplit(tokens, starts, 130, bos)
    rows = make_mixed_rows([split.tokens for split in splits.values()], 8, 24)
    hits = random.integers(0, 2, rows.tokens.shape).astype(bool)
    alone = {name: random.integers(0, 2, 129).astype(bool) for name in splits}
    found = count_by_distance(rows, hits, alone, splits)
    expected: Counter[Any] = Counter()
    for row, (numbers, offsets) in enumerate(zip(rows.domains, rows.offsets, strict=True)):
        for place in (1, 2):
            name = "ab"[numbers[place]]
            for distance in range(8):
                token = offsets[place] + distance
                if splits[name].tokens[token] == bos:
                    continue
                document = max(number for number, start in enumerate(splits[name].starts[:-1]) if start <= token)
                first = max([0, *(2**power for power in range(3) if 2**power <= distance)])
                expected[name, first, document, "tokens"] += 1
                expected[name, first, document, "hits"] += int(hits[row, 8 * place + distance])
                expected[name, first, document, "alone"] += int(alone[name][token - 1])
    for name in splits:
        assert [band["first"] for band in found[name]] == [0, 1, 2, 4]
        for band in found[name]:
            for key in ("tokens", "hits", "alone"):
                assert band[key] == [expected[name, band["first"], document, key] for document in range(4)]


@pytest.fixture(scope="module")
def world(shared_world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    return shared_world.at(tmp_path_factory.mktemp("mixed"))


def finish(world: World, *overrides: str) -> Any:
    run = compose([*world.overrides, "method.lr=0.05", "train.steps=8", *LONG_ROWS, *overrides], world.conf)
    execute(run, weights=True)
    return prepare_run(run)


def find_result(world: World, run: str) -> MixedResult:
    (found,) = [each for each in COLLECTION.read(world.root / "results") if each.asked["run"] == run]
    return found


@pytest.mark.parametrize("bos", [None, 3])
def test_a_token_is_predicted_from_the_row_before_it(world: World, bos: int | None) -> None:
    model = restore(finish(world, "method=sft")).eval()
    rows = np.random.default_rng(1).integers(5, 300, (5, 12))
    skipped = 0 if bos is not None else 1

    def predict(rows: Any) -> Any:
        before = rows[:, :-1] if bos is None else np.pad(rows[:, :-1], ((0, 0), (1, 0)), constant_values=bos)
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(before)).logits.argmax(-1).numpy()

    for place in range(skipped, 12, 2):  # every other token is the most likely one after those before it
        rows[:, place] = predict(rows)[:, place - skipped]
    found = find_row_hits(model, rows, bos, batch_size=2, chunk=7)
    assert (found[:, skipped:] == (predict(rows) == rows[:, skipped:])).all()
    assert found[:, skipped::2].all()
    assert not found[:, 1 - skipped :: 2].all()
    assert bos is not None or not found[:, 0].any()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "mode", "btm", "moelora"])
def test_a_finished_run_is_scored_on_mixed_rows(world: World, method: str) -> None:
    prepared = finish(world, f"method={method}")
    words = ("eval", "--mixed", f"method={method}", "method.lr=0.05", "train.steps=8", *LONG_ROWS)
    result = call(world, *words)
    assert result.exit_code == 0, result.output
    found = find_result(world, prepared.id)
    assert found.asked["segments"] == [32, 64]
    assert ("method.lr=0.05" in found.asked["variant"]) == (method != "btm")
    record = execute(prepared.run)
    for segment, domains in found.cases.items():
        for name, bands in domains.items():
            score = record.outcome.scores[name]
            tokens = np.sum([band.tokens for band in bands], axis=0)
            assert (tokens <= np.asarray(score.document_tokens)).all()
            assert [band.first for band in bands] == [0, *(2**power for power in range(int(np.log2(segment))))]
    again = call(world, *words)
    assert again.stdout == result.stdout
    assert call(world, "report", "mixed").exit_code == 0
    assert COLLECTION.stale(world.root / "results") == []
    assert (world.root / "results" / "mixed.png").exists()
    assert call(world, "report", "mixed", "--html").exit_code == 0


def test_alone_is_what_the_evaluation_says_of_the_same_tokens(world: World) -> None:
    prepared = finish(world, "method=sft")
    assert call(world, "eval", "--mixed", "method=sft", "method.lr=0.05", "train.steps=8", *LONG_ROWS).exit_code == 0
    model = restore(prepared).eval()
    splits = {name: prepared.packed[name].split("test") for name in prepared.run.scored}
    rows = make_mixed_rows([split.tokens for split in splits.values()], 64, 128)
    for number, (name, split) in enumerate(splits.items()):
        hits = score_stream(model, split, sequence_length=128, batch_size=64, chunk=512).hit
        mine = rows.offsets[:, 1][rows.domains[:, 1] == number]
        expected = sum(int(hits[offset - 1 : offset + 63].sum()) for offset in mine)
        assert sum(sum(band.alone) for band in find_result(world, prepared.id).cases[64][name]) == expected


def test_what_cannot_be_scored_on_mixed_rows_is_told(world: World) -> None:
    for words, named in [
        (("method=lora",), "is not finished"),
        (("--retention",), "--retention and --mixed exclude each other"),
        (("train.sequence_length=60", "method=backbone"), "train.sequence_length=60"),
        (("evaluate.domains=[sums]", "targets=[sums]", "method=backbone"), "two domains"),
    ]:
        if "method=backbone" in words:
            execute(compose([*world.overrides, *words], world.conf))
        result = call(world, "eval", "--mixed", *words)
        assert result.exit_code == 2, result.output
        assert named in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_damaged_result_is_refused(world: World) -> None:
    prepared = finish(world, "method=sft")
    assert call(world, "eval", "--mixed", "method=sft", "method.lr=0.05", "train.steps=8", *LONG_ROWS).exit_code == 0
    path = world.root / "results" / "mixed" / find_result(world, prepared.id).filename
    whole = path.read_text("utf-8")
    for change in (
        lambda case: case["sums"][1]["hits"].__setitem__(0, 10_000),
        lambda case: case["sums"][1].__setitem__("alone", [1]),
        lambda case: case["sums"][0].__setitem__("tokens", [0] * len(case["sums"][0]["tokens"])),
        lambda case: case.pop("py"),
    ):
        plain = json.loads(whole)
        change(plain["happened"]["cases"][0])
        path.write_text(json.dumps(plain), "utf-8")
        with refused(str(path)):
            COLLECTION.read(world.root / "results")
    path.write_text(whole, "utf-8")


def make_result(number: int, hits: int) -> MixedResult:
    """Return a result on two domains of forty documents of ten tokens, of which so many are predicted in mixed rows."""
    bands = [{"first": 0, "tokens": [10] * 40, "hits": [hits] * 40, "alone": [9] * 40}]
    asked = {
        "run": f"{number}", "run_name": f"m{number}", "method": "SFT", "variant": "", "backbone": "tiny",
        "targets": ["a"], "domains": ["a", "b"], "split": "test", "row": 64, "segments": [32],
    }  # fmt: skip
    happened = {"cases": [{"segment": 32, "rows": 9, "a": bands, "b": bands}]}
    return MixedResult(1, f"{number}", asked, happened, {"data": {"a": "1"}, "backbone": "2"})


def test_the_leader_is_bold_and_other_data_stand_apart() -> None:
    text = COLLECTION.render([make_result(1, 5), make_result(2, 6)])["md"]
    assert text.count("**60.00**") == 2
    assert "50.00" in text
    assert "40.00 ± 0.00" in text
    other = SimpleNamespace(**vars(make_result(3, 7)))
    other = MixedResult(1, "3", other.asked, other.happened, {"data": {"a": "other"}, "backbone": "2"})
    apart = COLLECTION.render([make_result(1, 5), other])["md"]
    assert apart.count("## ") == 2
    assert "**" not in apart


def test_labels_are_what_tells_results_of_a_method_apart() -> None:
    def vary(number: int, variant: str) -> MixedResult:
        made = make_result(number, 5)
        return MixedResult(1, f"{number}", {**made.asked, "variant": variant}, made.happened, made.provenance)

    results = [vary(1, "method.a=1"), vary(2, "method.a=1 'method.b=x y'")]
    assert label_results(results) == {"1": "SFT", "2": "SFT, b=x y"}
    assert label_results(results[1:]) == {"2": "SFT"}
