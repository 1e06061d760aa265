"""Splits follow from a document's text alone, and no duplicate leaks from one to another."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from mode.config.data import SPLITS, Split
from mode.data.split import (
    CHARACTERS,
    SHINGLE,
    choose_split,
    compute_signature,
    find_near_duplicates,
    make_shingles,
    split_documents,
)

SHARES: dict[Split, float] = {"train": 0.5, "validation": 0.1, "test": 0.15, "pretrain": 0.25}


def words(seed: int, count: int = 80) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(5000)}" for _ in range(count)]


def texts(count: int, start: int = 0) -> list[str]:
    return [" ".join(words(seed)) for seed in range(start, start + count)]


def in_split(name: Split, text: str) -> str:
    """Change a text by trailing words, few enough to stay a near duplicate, until its hash puts it in a split."""
    return next(changed for number in range(1000) if choose_split(changed := f"{text} end{number}", SHARES) == name)


def where(documents: dict[Split, list[str]]) -> dict[str, Split]:
    return {text: name for name, members in documents.items() for text in members}


def test_a_documents_split_depends_on_its_text_alone() -> None:
    some, more = texts(150), texts(100, start=1000)
    before = where(split_documents(some, SHARES).documents)
    shuffled = random.Random(0).sample([*some, *more], 250)
    after = where(split_documents(shuffled, SHARES).documents)
    assert len(before) == 150
    assert len(after) == 250
    assert {text: after[text] for text in some} == before
    assert where(split_documents(some[50:], SHARES).documents) == {text: before[text] for text in some[50:]}


def test_documents_keep_their_given_order_within_a_split() -> None:
    given = random.Random(3).sample(texts(100), 100)
    for members in split_documents(given, SHARES).documents.values():
        assert members == [text for text in given if text in set(members)]


def test_shares_are_met_but_for_chance() -> None:
    count = 20000
    found = Counter(choose_split(f"document {number}", SHARES) for number in range(count))
    for name, share in SHARES.items():
        deviation = (count * share * (1 - share)) ** 0.5
        assert abs(found[name] - count * share) < 5 * deviation


def test_a_larger_test_share_only_takes_documents_and_gives_none_back() -> None:
    wider: dict[Split, float] = {"train": 0.4, "validation": 0.1, "test": 0.25, "pretrain": 0.25}
    for number in range(500):
        if choose_split(f"document {number}", SHARES) == "test":
            assert choose_split(f"document {number}", wider) == "test"


def test_a_split_without_a_share_does_not_exist() -> None:
    divided = split_documents(texts(50), {"train": 0.6, "validation": 0.2, "test": 0.2, "pretrain": 0.0})
    assert set(divided.documents) == {"train", "validation", "test"}


def test_exact_duplicates_are_dropped_and_counted() -> None:
    some = texts(40)
    divided = split_documents([*some, *some[:7], some[0]], SHARES)
    assert divided.exact_dropped == 8
    assert sorted(where(divided.documents)) == sorted(some)
    assert sum(map(len, divided.documents.values())) == 40


@pytest.mark.parametrize(
    ("protected", "other"),
    [("test", "train"), ("test", "validation"), ("validation", "train"), ("train", "pretrain"), ("test", "pretrain")],
)
def test_of_near_duplicates_in_two_splits_the_more_protected_stays(protected: Split, other: Split) -> None:
    text = texts(1)[0]
    kept, dropped = in_split(protected, text), in_split(other, text)
    for given in ([kept, dropped], [dropped, kept]):
        divided = split_documents(given, SHARES)
        assert divided.near_dropped == 1
        assert where(divided.documents) == {kept: protected}


def test_the_order_of_protection_is_test_validation_train_pretrain() -> None:
    assert SPLITS == ("test", "validation", "train", "pretrain")
    text = texts(1)[0]
    divided = split_documents([in_split(name, text) for name in reversed(SPLITS)], SHARES)
    assert divided.near_dropped == 3
    assert {name: len(members) for name, members in divided.documents.items()} == {
        "test": 1, "validation": 0, "train": 0, "pretrain": 0}  # fmt: skip


def test_near_duplicates_within_a_split_are_kept() -> None:
    text = texts(1)[0]
    pair = [in_split("train", text), in_split("train", text + " and")]
    divided = split_documents(pair, SHARES)
    assert divided.near_dropped == 0
    assert divided.documents["train"] == pair


def test_unrelated_documents_and_documents_alike_only_in_part_are_kept() -> None:
    half = [" ".join([*words(0, 40), *words(seed, 40)]) for seed in range(1, 60)]
    divided = split_documents([*texts(300, start=500), *half], SHARES)
    assert divided.near_dropped == 0
    assert len(where(divided.documents)) == 359


def test_short_documents_are_compared_as_a_whole() -> None:
    groups: list[Split] = ["test", "train", "train"]
    assert find_near_duplicates(["a b", "a b", "a c"], groups) == {1}
    assert find_near_duplicates([], []) == set()


def shingles(text: str) -> set[tuple[str, ...]]:
    parts = text.split()
    return {tuple(parts[i : i + SHINGLE]) for i in range(len(parts) - SHINGLE + 1)}


@pytest.mark.parametrize("shared", [0, 100, 200, 300, 360, 390, 400])
def test_minhash_estimates_the_jaccard_similarity(shared: int) -> None:
    errors = []
    for seed in range(12):
        one = " ".join(words(seed, 400))
        other = " ".join([*words(seed, 400)[:shared], *words(seed + 100, 400 - shared)])
        exact = len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))
        estimate = float(np.mean(compute_signature(one) == compute_signature(other)))
        deviation = (exact * (1 - exact) / len(compute_signature(one))) ** 0.5
        assert abs(estimate - exact) <= 5 * deviation + 1e-9
        errors.append(estimate - exact)
    assert abs(np.mean(errors)) < 0.03  # unbiased


def test_a_signature_does_not_depend_on_spaces_and_line_breaks() -> None:
    assert np.array_equal(compute_signature("a b c d e f"), compute_signature("a  b\nc\td e f\n"))


def symbols(seed: int, letters: str, count: int = 200) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(letters) for _ in range(count))


CHINESE = "".join(map(chr, range(0x4E00, 0x4F00)))
THAI = "".join(map(chr, range(0x0E01, 0x0E2E)))
UNSPACED = {
    "chinese": lambda seed: symbols(seed, CHINESE),
    "thai, a space after every phrase": lambda seed: " ".join(symbols(10 * seed + i, THAI, 25) for i in range(8)),
    "minified code": lambda seed: ";".join(f"{symbols(10 * seed + i, 'abcdef', 4)}(x[{i}])" for i in range(20)) + " ",
}


@pytest.mark.parametrize("script", UNSPACED)
def test_near_duplicates_without_white_space_are_dropped_across_splits(script: str) -> None:
    make = UNSPACED[script]
    originals = [make(seed) for seed in range(40)]
    changed = [text[:100] + "X" + text[101:] for text in originals]
    apart = sum(
        choose_split(one, SHARES) != choose_split(two, SHARES) for one, two in zip(originals, changed, strict=True)
    )
    divided = split_documents([*originals, *changed], SHARES)
    assert apart > 10
    assert divided.near_dropped == apart
    assert split_documents(originals, SHARES).near_dropped == 0


def test_a_text_with_spaces_has_shingles_of_words() -> None:
    text = "def compute_signature(text): return [word_of(text) for word in text.split()]"
    assert next(iter(make_shingles(text))) == " ".join(text.split()[:SHINGLE])
    unspaced = "文字に空白がありません。" * 3
    assert {len(shingle) for shingle in make_shingles(unspaced)} == {CHARACTERS}
    assert list(make_shingles("")) == [""]
