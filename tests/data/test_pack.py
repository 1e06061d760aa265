"""Packed domains appear whole or not at all, and batches are a pure function of seed and step."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mode.config.data import Domain, FilesSource
from mode.core.files import remove
from mode.data import pack
from mode.data.batches import Batches, Stream
from mode.data.pack import describe_small_splits, prepare_domain
from mode.data.split import choose_split
from tests.support.refusals import check_message, refused


class Letters:
    """A tokenizer that gives one token a character."""

    eos_id = 0
    bos_id: int | None = None

    def __init__(self, vocab_size: int = 300, fingerprint: str = "letters") -> None:
        """Set what packing asks of a tokenizer."""
        self.vocab_size, self.fingerprint = vocab_size, fingerprint
        self.calls = 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        self.calls += 1
        return [[ord(letter) for letter in text] for text in texts]


@pytest.fixture
def domain(tmp_path: Path) -> Domain:
    for number in range(60):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{number:02}.txt").write_text(f"document {number} of {number % 7}ü", encoding="utf-8")
    return Domain(
        description="letters",
        licence="CC0-1.0",
        sources=(FilesSource(kind="files", paths=(str(tmp_path / "text"),)),),
        splits={"train": 0.6, "validation": 0.2, "test": 0.2},
    )


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "packed").iterdir()) if (folder / "packed").exists() else []


# --- prepare


def test_a_prepared_domain_is_not_prepared_again(domain: Domain, tmp_path: Path) -> None:
    tokenizer = Letters()
    first = prepare_domain("x", domain, tokenizer, tmp_path)
    calls = tokenizer.calls
    assert calls == 3
    second = prepare_domain("x", domain, tokenizer, tmp_path)
    assert tokenizer.calls == calls
    assert second.fingerprint == first.fingerprint
    assert entries(tmp_path) == [first.folder.name]
    # Prepared elsewhere from the same text, it is the same data.
    assert prepare_domain("x", domain, tokenizer, tmp_path / "other").fingerprint == first.fingerprint


def test_a_split_is_its_documents_each_closed_by_the_end_token(domain: Domain, tmp_path: Path) -> None:
    packed = prepare_domain("x", domain, Letters(), tmp_path)
    found = []
    for name in ("train", "validation", "test"):
        split = packed.split(name)
        documents = []
        for start, stop in zip(split.starts[:-1], split.starts[1:], strict=True):
            assert split.tokens[stop - 1] == 0
            documents.append("".join(map(chr, split.tokens[start : stop - 1])))
        assert split.starts[0] == 0
        assert split.starts[-1] == len(split.tokens)
        assert split.num_bytes == sum(len(text.encode()) for text in documents)
        info = packed.meta["splits"][name]
        assert (info["documents"], info["tokens"]) == (len(documents), len(split.tokens))
        found += documents
    assert sorted(found) == sorted(f"document {number} of {number % 7}ü" for number in range(60))


def test_every_document_begins_as_the_backbones_documents_do(domain: Domain, tmp_path: Path) -> None:
    class Begun(Letters):
        bos_id = 1

        def encode(self, texts: list[str]) -> list[list[int]]:
            return [[1, *ids] for ids in super().encode(texts)]

    plain, begun = (prepare_domain("x", domain, made, tmp_path) for made in (Letters(), Begun(fingerprint="begun")))
    for name in ("train", "validation", "test"):
        split = begun.split(name)
        assert (split.tokens[split.starts[:-1]] == 1).all()
        assert np.array_equal(split.tokens[split.tokens != 1], plain.split(name).tokens)
        assert (split.bos, plain.split(name).bos) == (1, None)
        assert split.num_bytes == plain.split(name).num_bytes


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_tokens_take_the_smallest_type_that_holds_the_vocabulary(
    domain: Domain, tmp_path: Path, vocab_size: int, dtype: type
) -> None:
    stream = prepare_domain("x", domain, Letters(vocab_size), tmp_path).split("train").tokens
    assert stream.dtype == dtype
    assert isinstance(stream, np.memmap)
    assert max(stream) == ord("ü")


def test_a_token_beyond_the_vocabularys_type_is_never_wrapped_round(domain: Domain, tmp_path: Path) -> None:
    class Wide(Letters):
        def encode(self, texts: list[str]) -> list[list[int]]:
            return [[2**16 + 5] for _ in texts]

    with pytest.raises(OverflowError):
        prepare_domain("x", domain, Wide(), tmp_path)
    assert entries(tmp_path) == []


def test_the_fingerprint_follows_text_and_tokenizer_and_not_the_description(domain: Domain, tmp_path: Path) -> None:
    fingerprint = prepare_domain("x", domain, Letters(), tmp_path).fingerprint
    described = replace(domain, description="other words", licence="other terms")
    assert prepare_domain("x", described, Letters(), tmp_path).fingerprint == fingerprint
    assert prepare_domain("y", domain, Letters(), tmp_path).fingerprint == fingerprint
    assert prepare_domain("x", domain, Letters(fingerprint="other"), tmp_path).fingerprint != fingerprint
    halved = replace(domain, splits={"train": 0.5, "validation": 0.2, "test": 0.3})
    assert prepare_domain("x", halved, Letters(), tmp_path).fingerprint != fingerprint
    (tmp_path / "text" / "00.txt").write_text("document 0 of another", encoding="utf-8")
    assert prepare_domain("x", domain, Letters(), tmp_path).fingerprint != fingerprint


def test_a_failure_half_way_leaves_nothing(domain: Domain, tmp_path: Path) -> None:
    class Failing(Letters):
        def encode(self, texts: list[str]) -> list[list[int]]:
            if self.calls == 1:
                raise RuntimeError("half-way")
            return super().encode(texts)

    with pytest.raises(RuntimeError, match="half-way"):
        prepare_domain("x", domain, Failing(), tmp_path)
    assert entries(tmp_path) == []
    assert len(prepare_domain("x", domain, Letters(), tmp_path).split("train").tokens) > 0


def test_another_process_that_finishes_first_is_tolerated(
    domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = pack.write_packed

    def overtaken(folder: Path, *arguments: Any) -> dict[str, Any]:
        meta = genuine(folder, *arguments)
        monkeypatch.setattr(pack, "write_packed", genuine)
        prepare_domain("x", domain, Letters(), tmp_path)
        return meta

    monkeypatch.setattr(pack, "write_packed", overtaken)
    packed = prepare_domain("x", domain, Letters(), tmp_path)
    assert entries(tmp_path) == [packed.folder.name]
    assert len(packed.split("test").tokens) > 0


def test_a_disk_error_is_not_mistaken_for_another_process(
    domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        prepare_domain("x", domain, Letters(), tmp_path)
    assert entries(tmp_path) == []


def test_an_empty_split_is_refused(domain: Domain, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("the only document", encoding="utf-8")
    lonely = replace(domain, sources=(FilesSource(kind="files", paths=(str(tmp_path / "one"),)),))
    with refused("domain x", "1 document,", "split", "separator"):
        prepare_domain("x", lonely, Letters(), tmp_path)
    assert entries(tmp_path) == []


def test_one_big_file_is_divided_by_a_separator(domain: Domain, tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_text("\n\n".join(f"document {number}" for number in range(60)), encoding="utf-8")
    source = FilesSource(kind="files", paths=(str(tmp_path / "big.txt"),), separator="\n\n")
    packed = prepare_domain("x", replace(domain, sources=(source,)), Letters(), tmp_path)
    assert sum(split["documents"] for split in packed.meta["splits"].values()) == 60


def test_few_effective_documents_are_warned_of(domain: Domain, tmp_path: Path) -> None:
    packed = prepare_domain("x", domain, Letters(), tmp_path)
    assert packed.split("test").effective_documents == pytest.approx(
        packed.meta["splits"]["test"]["documents"], rel=0.05
    )
    assert describe_small_splits(packed) == []
    number = next(n for n in range(99) if choose_split("long " * 4000 + str(n), domain.splits) == "test")
    (tmp_path / "text" / "long.txt").write_text("long " * 4000 + str(number), encoding="utf-8")
    packed = prepare_domain("x", domain, Letters(), tmp_path)
    (warning,) = describe_small_splits(packed)
    check_message(warning, "domain x", "test split", "1.0", f"({packed.meta['splits']['test']['documents']},")


def test_a_split_that_a_domain_lacks_is_refused_with_those_it_has(domain: Domain, tmp_path: Path) -> None:
    with refused("domain x", "pretrain", "test, validation, train"):
        prepare_domain("x", domain, Letters(), tmp_path).split("pretrain")


def test_dropped_duplicates_are_counted_in_the_description(domain: Domain, tmp_path: Path) -> None:
    (tmp_path / "text" / "twin.txt").write_text("document 0 of 0ü", encoding="utf-8")
    packed = prepare_domain("x", domain, Letters(), tmp_path)
    assert packed.meta["exact_duplicates_dropped"] == 1
    assert packed.meta["near_duplicates_dropped"] == 0


# --- damage


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test.bin", "train.bin", "validation.starts.npy", "meta.json"])
@pytest.mark.parametrize("damage", [zero, truncate, flip, Path.unlink])
def test_a_damaged_domain_is_reported_and_prepared_again(
    domain: Domain, tmp_path: Path, name: str, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare_domain("x", domain, Letters(), tmp_path)
    whole = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    damage(first.folder / name)
    second = prepare_domain("x", domain, Letters(), tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(first.folder) in line
    assert name in line
    assert second.meta == first.meta
    assert {path.name: path.read_bytes() for path in second.folder.iterdir()} == whole
    assert entries(tmp_path) == [first.folder.name]
    prepare_domain("x", domain, Letters(), tmp_path)
    assert capsys.readouterr().err == ""


def test_a_file_that_is_damaged_after_the_check_is_refused(domain: Domain, tmp_path: Path) -> None:
    packed = prepare_domain("x", domain, Letters(), tmp_path)
    truncate(packed.folder / "test.bin")
    with refused("test.bin"):
        packed.split("test")
    packed.split("train")


def strip_digests(folder: Path) -> None:
    """Turn the index of a domain into that of an earlier version, without digests."""
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    kept = {key: value for key, value in meta.items() if key not in ("files", "digest")}
    (folder / "meta.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")


def test_a_whole_domain_of_an_earlier_version_is_kept_and_gets_digests(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, tokenizer = prepare_domain("x", domain, Letters(), tmp_path), Letters()
    strip_digests(first.folder)
    (first.folder / "contamination-0.json").write_text("0.5", encoding="utf-8")
    second = prepare_domain("x", domain, tokenizer, tmp_path)
    assert tokenizer.calls == 0
    assert second.meta == first.meta
    assert capsys.readouterr().err == ""
    zero(first.folder / "test.bin")
    assert prepare_domain("x", domain, tokenizer, tmp_path).meta == first.meta
    assert "test.bin" in capsys.readouterr().err


def test_a_damaged_domain_of_an_earlier_version_is_prepared_again(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare_domain("x", domain, Letters(), tmp_path)
    strip_digests(first.folder)
    zero(first.folder / "test.bin")
    assert prepare_domain("x", domain, Letters(), tmp_path).meta == first.meta
    assert str(first.folder) in capsys.readouterr().err


@pytest.mark.parametrize("former", [False, True])
def test_a_damaged_domain_that_would_be_another_one_is_refused(
    domain: Domain, tmp_path: Path, former: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other(Letters):
        def encode(self, texts: list[str]) -> list[list[int]]:
            return [[*ids, 1] for ids in super().encode(texts)]

    first = prepare_domain("x", domain, Letters(), tmp_path)
    if former:
        strip_digests(first.folder)
    zero(first.folder / "test.bin")
    for _ in range(2):
        with refused(str(first.folder), "remove the folder"):
            prepare_domain("x", domain, Other(), tmp_path)
    assert entries(tmp_path) == [first.folder.name]
    remove(first.folder)
    assert prepare_domain("x", domain, Other(), tmp_path).fingerprint != first.fingerprint


def test_a_full_disk_is_reported_with_the_path_and_the_bytes(
    domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with refused(f"{tmp_path}/packed/x-", "needed", "free", "No space left"):
            prepare_domain("x", domain, Letters(), tmp_path)
    assert entries(tmp_path) == []


# --- batches

LENGTH = 8


def stream(name: str, num_tokens: int, weight: int = 1, first: int = 0) -> Stream:
    """Return a stream whose tokens tell their place and their domain."""
    return Stream(name, np.arange(first, first + num_tokens, dtype=np.uint32), weight)


def batches(*streams: Stream, seed: int = 3, batch_size: int = 4) -> Batches:
    return Batches(list(streams), seed=seed, batch_size=batch_size, sequence_length=LENGTH)


def two() -> tuple[Stream, Stream]:
    return stream("a", 205), stream("b", 90, first=1000)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    in_order = batches(*two())
    expected = [in_order.batch(step) for step in range(40)]
    for step in (39, 0, 17, 16, 39, 3):
        assert np.array_equal(batches(*two()).batch(step), expected[step])
        assert np.array_equal(in_order.batch(step), expected[step])
    assert expected[0].shape == (4, LENGTH + 1)
    assert expected[0].dtype == np.int64


def test_the_rows_of_a_run_do_not_depend_on_the_batch_size() -> None:
    small, large = batches(*two(), batch_size=2), batches(*two(), batch_size=6)
    rows = np.concatenate([small.batch(step) for step in range(30)])
    assert np.array_equal(rows, np.concatenate([large.batch(step) for step in range(10)]))


def test_different_seeds_give_different_orders() -> None:
    one, other = batches(*two(), seed=3), batches(*two(), seed=4)
    rows = [np.concatenate([made.batch(step) for step in range(5)]) for made in (one, other)]
    assert not np.array_equal(rows[0], rows[1])


def test_two_domains_of_one_length_are_not_read_in_one_order() -> None:
    made = batches(stream("a", 400), stream("b", 400))
    rows = np.stack([made.row(index) for index in range(40)])
    assert not np.array_equal(rows[0::2], rows[1::2])


def test_equal_weights_give_equal_counts_at_every_even_length() -> None:
    made = batches(*two())
    seen = [name for step in range(50) for name in made.domains(step)]
    for rows in range(2, 201, 2):
        assert Counter(seen[:rows]) == {"a": rows // 2, "b": rows // 2}


def test_weights_are_respected_in_every_cycle() -> None:
    made = batches(stream("a", 300, 3), stream("b", 300, 1, 1000), stream("c", 300, 2, 2000), batch_size=5)
    seen = [name for step in range(60) for name in made.domains(step)]
    for start in range(0, 300, 6):
        assert Counter(seen[start : start + 6]) == {"a": 3, "b": 1, "c": 2}


def test_a_row_is_a_slice_of_the_stream_of_its_domain() -> None:
    made = batches(stream("a", 203, 2), stream("b", 91, 1, 1000))
    for step in range(60):
        for row, name in zip(made.batch(step), made.domains(step), strict=True):
            first, length = (0, 203) if name == "a" else (1000, 91)
            assert np.array_equal(row, np.arange(row[0], row[0] + LENGTH + 1))
            assert first <= row[0]
            assert row[-1] < first + length


def test_no_window_is_repeated_within_an_epoch_and_every_epoch_has_a_new_order() -> None:
    made = batches(stream("a", 205))
    num_windows = 204 // LENGTH - 1
    epochs = [[int(made.row(e * num_windows + i)[0]) for i in range(num_windows)] for e in range(6)]
    for starts in epochs:
        assert len(set(starts)) == num_windows
        assert sorted(starts) == list(range(min(starts), min(starts) + num_windows * LENGTH, LENGTH))
    assert len({tuple(np.argsort(starts)) for starts in epochs}) == 6
    assert len({min(starts) for starts in epochs}) > 1


def test_a_stream_of_two_rows_is_enough_and_a_shorter_one_refused() -> None:
    least = 2 * LENGTH + 1
    assert batches(stream("a", least)).batch(5).shape == (4, LENGTH + 1)
    with refused("domain a", f"{least - 1} ", str(LENGTH), "train.sequence_length"):
        batches(stream("a", least - 1))


def test_a_weight_below_one_is_refused() -> None:
    with refused("domain b", "weight 0"):
        batches(stream("a", 100), stream("b", 100, 0))


def test_another_order_under_the_same_seed_draws_other_rows() -> None:
    streams = [Stream("a", np.arange(4000, dtype=np.uint16), 1)]
    drawn = []
    for order in (0, 1):
        batches = Batches(streams, seed=0, batch_size=8, sequence_length=16, order=order)
        drawn.append({int(row[0]) for step in range(3) for row in batches.batch(step)})
    assert len(drawn[0] & drawn[1]) < 8  # of 24 rows each: some windows coincide by chance, the orders do not


@pytest.mark.parametrize("examples", [2, 3, 12, 13])
def test_examples_are_the_first_rows_of_the_mix_and_no_others_are_ever_seen(examples: int) -> None:
    streams = [stream("a", 205, 2), stream("b", 205, 1, first=1000)]
    whole, few = (
        Batches(streams, seed=3, batch_size=4, sequence_length=LENGTH, examples=limit) for limit in (None, examples + 1)
    )
    first = [tuple(whole.row(index)) for index in range(examples + 1)]
    later = [tuple(few.row(index)) for index in range(30 * (examples + 1))]
    assert later[: examples + 1] == first
    assert set(later) == set(first)
    assert Counter(few.domains(0)) == Counter(whole.domains(0))
    by_domain = [[row for row in later if bool(row[0] >= 1000) is other] for other in (False, True)]
    for rows in by_domain:
        counts = Counter(rows).values()
        assert max(counts) - min(counts) <= 1


def test_more_examples_than_there_are_change_nothing() -> None:
    whole, many = (
        Batches([stream("a", 205)], seed=3, batch_size=4, sequence_length=LENGTH, examples=n) for n in (None, 999)
    )
    assert all(np.array_equal(whole.batch(step), many.batch(step)) for step in range(40))


def test_later_epochs_of_few_examples_have_new_orders() -> None:
    few = Batches([stream("a", 205)], seed=3, batch_size=4, sequence_length=LENGTH, examples=7)
    epochs = {tuple(int(few.row(epoch * 7 + place)[0]) for place in range(7)) for epoch in range(5)}
    assert len(epochs) == 5


def test_fewer_examples_than_a_cycle_of_the_mix_are_refused() -> None:
    with refused("train.batch.examples=1", "2 rows"):
        Batches(list(two()), seed=3, batch_size=4, sequence_length=LENGTH, examples=1)
