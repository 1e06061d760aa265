"""What is noise and what is not: documents drawn anew, and seeds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from mode.records.metrics import ACCURACY, METRICS
from mode.records.score import Score
from mode.tables.compile import RowResult
from mode.tables.statistics import (
    RESAMPLES,
    correct_holm,
    count_effective,
    draw_resamples,
    interval_over_documents,
    interval_over_seeds,
    resample,
)
from tests.evaluation.test_next_token import of


def score(tokens: list[int], hits: list[int]) -> Score:
    sums = {"document_hits": tuple(hits)}
    return Score({"accuracy": sum(hits) / sum(tokens)}, None, sum(tokens), None, tuple(tokens), sums)


def documents(seed: int, count: int = 400) -> tuple[list[int], list[int]]:
    random = np.random.default_rng(seed)
    tokens = random.integers(20, 400, count)
    hits = random.binomial(tokens, random.beta(4, 6, count))
    return tokens.tolist(), hits.tolist()


def test_a_resample_draws_as_many_documents_and_the_same_for_every_row() -> None:
    chosen = draw_resamples("code", 7)
    assert chosen.shape == (RESAMPLES, 7)
    assert set(chosen.sum(1)) == {7.0}
    assert draw_resamples("code", 7) is chosen
    assert not np.array_equal(draw_resamples("math", 7), chosen)
    assert chosen.mean(0) == pytest.approx(np.ones(7), abs=0.1)


def test_the_bootstraps_spread_is_the_standard_error_clustered_by_document() -> None:
    tokens, hits = documents(0)
    told = of([[1] * right + [0] * (count - right) for count, right in zip(tokens, hits, strict=True)])
    found = resample({"code": score(tokens, hits)}, ACCURACY)["code"]
    assert told.stderr is not None
    assert float(found.std()) == pytest.approx(told.stderr, rel=0.1)
    assert float(found.mean()) == pytest.approx(told.accuracy, abs=told.stderr / 5)


def test_pairing_takes_away_what_documents_have_in_common() -> None:
    tokens, hits = documents(1)
    better = [min(count, right + 2) for count, right in zip(tokens, hits, strict=True)]
    ours, theirs = (resample({"code": score(tokens, each)}, ACCURACY)["code"] for each in (better, hits))
    paired = interval_over_documents(float((ours - theirs).mean()), [ours - theirs], count_effective(tokens))
    assert paired is not None
    assert paired.excludes_zero
    assert paired.low > 0.0
    # Unpaired, the difference is far below the spread of either.
    assert paired.high - paired.low < 0.2 * 4 * float(theirs.std())


def test_equal_rows_have_no_difference() -> None:
    tokens, hits = documents(2)
    same = resample({"code": score(tokens, hits)}, ACCURACY)["code"]
    interval = interval_over_documents(0.0, [same - same], count_effective(tokens))
    assert interval is not None
    assert (interval.low, interval.high, interval.p, interval.excludes_zero) == (0.0, 0.0, 1.0, False)


UNLIKE = (106, 400, 7037, 1827, 1129, 1938, 1127, 447, 615, 7989, 14392, 10287, 4001, 9710, 2269, 376)
MANY = tuple(range(50, 150)) * 2


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [UNLIKE, MANY], ids=["few documents of unlike lengths", "many"])
def test_about_five_of_a_hundred_intervals_miss_the_truth(sizes: tuple[int, ...]) -> None:
    # Two rows equal in truth, whose difference varies from document to document.
    wrong, tokens = 0, np.asarray(sizes)
    for seed in range(400):
        random = np.random.default_rng(seed)
        hits = [tokens * np.clip(0.5 + 0.05 * random.standard_normal(len(tokens)), 0, 1) for _ in range(2)]
        pair = [score(list(sizes), each.round().astype(int).tolist()) for each in hits]
        ours, theirs = (resample({"code": each}, ACCURACY)["code"] for each in pair)
        gap = pair[0].accuracy - pair[1].accuracy
        interval = interval_over_documents(gap, [ours - theirs], count_effective(sizes))
        assert interval is not None
        wrong += interval.excludes_zero
    assert 8 <= wrong <= 32  # 20 are meant; three standard errors are 13


@pytest.mark.parametrize("tokens", [[10], [1000, 3, 3]])
def test_with_fewer_than_two_effective_documents_nothing_is_beyond_noise(tokens: list[int]) -> None:
    rows = [line([0.4]), line([0.2])]
    rows = [replace(row, documents={"code": count_effective(tokens)}) for row in rows]
    gap = rows[0].minus(rows[1], "code")
    assert gap is not None
    assert (gap.documents, gap.p, gap.holds) == (None, None, False)


def test_p_values_are_those_of_students_t() -> None:
    values = [0.3, 0.9, 0.1, 0.8]
    expected = ttest_1samp(values, 0.0)
    interval = interval_over_seeds(values)
    assert interval is not None
    assert interval.p == pytest.approx(expected.pvalue)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_holms_correction_is_the_step_down_by_rank() -> None:
    values = [0.01, 0.04, 0.03, 0.005]
    assert correct_holm(values) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_holm([0.9, 0.8]) == [1.0, 1.0]
    assert correct_holm([]) == []


@pytest.mark.parametrize(("count", "critical"), [(2, 12.706), (3, 4.303), (5, 2.776), (40, 2.023)])
def test_intervals_over_seeds_are_students(count: int, critical: float) -> None:
    values = [float(number % 2) for number in range(count)]
    interval = interval_over_seeds(values)
    assert interval is not None
    mean = sum(values) / count
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    assert interval.high - mean == pytest.approx(critical * error, rel=2e-3)
    assert mean - interval.low == pytest.approx(critical * error, rel=2e-3)


def line(qualities: list[float], spread: float = 0.0) -> RowResult:
    """Return a row with one column, whose resamples differ by as much."""
    waves = spread * np.linspace(-1, 1, RESAMPLES)
    return RowResult(
        name="row",
        label="Row",
        quality={seed: {"code": value} for seed, value in enumerate(qualities)},
        resampled={seed: {"code": value + waves} for seed, value in enumerate(qualities)},
        documents={"code": 1000.0},
        cost={},
    )


@pytest.mark.parametrize(
    ("ours", "spread", "holds"),
    [
        ([2.0, 2.1, 1.9], 0.0, True),
        ([2.0, 2.1, 1.9], 3.0, False),  # documents could explain it
        ([2.0, -1.0, 1.9], 0.0, False),  # seeds could
        ([2.0], 1.0, True),  # with one seed, documents alone decide
        ([0.0, 0.0, 0.0], 0.0, False),
    ],
)
def test_a_difference_holds_if_neither_documents_nor_seeds_explain_it(
    ours: list[float], spread: float, holds: bool
) -> None:
    gap = line(ours, spread).minus(line([0.0] * len(ours)), "code")
    assert gap is not None
    assert gap.holds is holds


def test_a_metric_per_byte_is_resampled_in_its_own_unit() -> None:
    tokens, nats = (10, 30), (20.0, 90.0)
    score = Score({}, None, 40, 80, tokens, {"document_nll": nats})
    bits, loss = (resample({"code": score}, METRICS[name])["code"] for name in ("bits-per-byte", "loss"))
    assert loss.min() == pytest.approx(2.0)  # the first document alone
    assert loss.max() == pytest.approx(3.0)
    assert bits == pytest.approx(loss / math.log(2) * 40 / 80)
    assert resample({"code": score}, ACCURACY) == {}
