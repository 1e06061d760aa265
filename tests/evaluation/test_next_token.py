"""Scores equal a computation by hand from full logits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from mode.data.pack import PackedSplit
from mode.evaluation.next_token import check_finite, choose_rows, evaluate, flatten_scores, score_stream, summarise
from mode.ops.loss import (
    CHUNK,
    PART,
    ChunkedLoss,
    compute_hidden_states,
    compute_next_token_loss,
    find_head,
    find_hits,
    score_states,
)
from mode.records.metrics import METRICS, TokenValues
from mode.records.score import Score, compute_error
from tests.support.refusals import refused

VOCABULARY, HIDDEN, LENGTH = 23, 8, 6


class Tiny(nn.Module):
    """A causal model whose state is a running mean, so that every token of the context matters."""

    def __init__(self) -> None:
        """Draw the weights."""
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.output = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.seen: list[Tensor] = []
        self.dropout = nn.Dropout(0.5)
        self.config = PreTrainedConfig()

    @property
    def base_model(self) -> Any:
        return self.trunk

    def trunk(self, input_ids: Tensor, use_cache: bool) -> Any:
        self.seen.append(input_ids)
        embedded = self.embedding(input_ids)
        count = torch.arange(1, embedded.shape[1] + 1)[None, :, None]
        states = self.dropout(embedded + embedded.cumsum(1) / count)
        return type("Output", (), {"last_hidden_state": states})

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def logits(self, input_ids: Tensor) -> Tensor:
        return self.output(compute_hidden_states(self, input_ids))


def packed(*lengths: int, seed: int = 0, num_bytes: int = 1000) -> PackedSplit:
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, sum(lengths)).astype(np.uint16)
    return PackedSplit(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), num_bytes)


def run(model: nn.Module, split: PackedSplit, batch_size: int = 2, chunk: int = 7) -> Score:
    return evaluate(model, split, sequence_length=LENGTH, batch_size=batch_size, chunk=chunk)


@torch.no_grad()
def by_hand(model: Tiny, split: PackedSplit) -> tuple[list[float], list[bool]]:
    """Score window by window, one forward pass each, from full logits."""
    model.eval()
    nll, hit = [], []
    stream = split.tokens.astype(np.int64)
    for start in range(0, len(stream) - 1, LENGTH):
        window = torch.from_numpy(stream[start : start + LENGTH + 1])
        logits = model.logits(window[None, :-1])[0]
        for place, target in enumerate(window[1:].tolist()):
            nll.append(-float(logits[place].double().log_softmax(-1)[target]))
            hit.append(int(logits[place].argmax()) == target)
    return nll, hit


# The streams end within a row, with a whole row, within a batch, and one token into a row.
@pytest.mark.parametrize("lengths", [(5, 9, 1, 20), (13,), (4, 3), (25, 1), (2,), (3, 9)])
def test_accuracy_and_loss_equal_a_computation_by_hand(lengths: tuple[int, ...]) -> None:
    model, split = Tiny(), packed(*lengths)
    score = run(model, split)
    nll, hit = by_hand(model, split)
    assert score.tokens == len(nll) == sum(lengths) - 1
    assert score.accuracy == pytest.approx(np.mean(hit))
    assert score.loss == pytest.approx(np.mean(nll), rel=1e-6)
    assert score.values["bits_per_byte"] == pytest.approx(sum(nll) / math.log(2) / 1000, rel=1e-6)
    edges = np.maximum(split.starts - 1, 0)
    pairs = list(pairwise(edges))
    assert score.document_tokens == tuple(stop - start for start, stop in pairs)
    assert score.document_sums["document_hits"] == tuple(sum(hit[start:stop]) for start, stop in pairs)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(5, 9, 2, 20), (13,), (4, 3), (25, 2)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_window_begins_as_documents_do_and_their_first_token_is_not_scored(
    lengths: tuple[int, ...], batch_size: int
) -> None:
    model, plain, bos = Tiny().eval(), packed(*lengths), 3
    tokens = np.where(plain.tokens == bos, bos + 1, plain.tokens)
    tokens[plain.starts[:-1]] = bos
    split = PackedSplit(tokens, plain.starts, plain.num_bytes, bos)
    nll: list[list[float]] = [[] for _ in lengths]
    for place in range(1, len(tokens)):
        start = (place - 1) // LENGTH * LENGTH
        seen = torch.from_numpy(np.concatenate([[bos], tokens[start + 1 : place]]).astype(np.int64))
        if tokens[place] != bos:
            document = int(np.searchsorted(split.starts, place, "right")) - 1
            nll[document].append(-float(model.logits(seen[None])[0, -1].double().log_softmax(-1)[tokens[place]]))
    score = run(model, split, batch_size)
    assert score.document_tokens == tuple(map(len, nll)) == tuple(length - 1 for length in lengths)
    assert score.tokens == sum(map(len, nll))
    assert score.loss == pytest.approx(np.mean(np.concatenate(nll)), rel=1e-6)
    assert score.document_sums["document_nll"] == pytest.approx([sum(each) for each in nll], abs=2e-3)


def test_top_5_accuracy_counts_the_tokens_with_fewer_than_five_likelier_ones() -> None:
    model, split = Tiny().eval(), packed(9, 30, 4)
    score = run(model, split)
    stream, right = torch.from_numpy(split.tokens.astype(np.int64)), []
    for start in range(0, len(stream) - 1, LENGTH):
        window = stream[start : start + LENGTH + 1]
        best = model.logits(window[None, :-1])[0].topk(5).indices
        right += (best == window[1:, None]).any(-1).tolist()
    assert 0 < sum(right) < len(right)
    assert score.values["top_5_accuracy"] == sum(right) / len(right)
    pairs = pairwise(np.maximum(split.starts - 1, 0))
    assert score.document_sums["document_top_5_hits"] == tuple(sum(right[start:stop]) for start, stop in pairs)


def test_sums_over_documents_give_every_metric_and_its_error_again() -> None:
    score = run(Tiny(), packed(9, 30, 4))
    for metric in METRICS.values():
        older = replace(score, values={})
        assert older.find(metric) == pytest.approx(score.values[metric.key], rel=1e-4)
        assert older.find_error(metric) == score.find_error(metric)
    accuracy = score.find_error(METRICS["accuracy"])
    assert accuracy == compute_error(score.document_sums["document_hits"], score.document_tokens)
    in_bits = score.find_error(METRICS["loss"]) / math.log(2) * score.tokens / 1000
    assert score.find_error(METRICS["bits-per-byte"]) == pytest.approx(in_bits)


def test_a_score_comes_back_from_its_record() -> None:
    score = run(Tiny(), packed(9, 30, 4))
    assert Score.from_plain(json.loads(json.dumps(score.to_plain()))) == score


def test_bits_per_byte_follow_from_loss_and_bytes_where_they_are_not_recorded() -> None:
    score = run(Tiny(), packed(9, 30, 4))
    lossy = replace(score, values={"loss": score.loss}, document_sums={})
    assert lossy.find(METRICS["bits-per-byte"]) == pytest.approx(score.values["bits_per_byte"], rel=1e-12)
    assert replace(lossy, bytes=None).find(METRICS["bits-per-byte"]) is None
    assert lossy.find(METRICS["top-5-accuracy"]) is None
    assert lossy.find_error(METRICS["loss"]) is None


def test_every_token_but_the_first_is_scored_exactly_once() -> None:
    model, split = Tiny(), packed(7, 12, 4)
    run(model, split)
    # A target is the token after an input; the inputs' windows tile the stream without its last token.
    inputs = torch.cat([rows.reshape(-1) for rows in model.seen])[: len(split.tokens) - 1]
    assert np.array_equal(inputs.numpy(), split.tokens[:-1])
    score = run(model, split)
    assert score.document_tokens == (6, 12, 4)
    assert sum(score.document_tokens) == score.tokens == len(split.tokens) - 1


def test_padding_is_never_scored() -> None:
    class Certain(Tiny):
        """Predicts token 0, which is also what a row is padded with."""

        def trunk(self, input_ids: Tensor, use_cache: bool) -> Any:
            states = torch.ones(*input_ids.shape, HIDDEN)
            return type("Output", (), {"last_hidden_state": states})

    model = Certain()
    model.output.weight.data = torch.zeros(VOCABULARY, HIDDEN)
    model.output.weight.data[0] = 5.0
    split = PackedSplit(np.full(9, 3, np.uint16), np.array([0, 9]), 9)  # 8 scored, 4 padded
    score = run(model, split)
    assert score.tokens == 8
    assert score.accuracy == 0.0
    assert score.loss == pytest.approx(40.0, rel=1e-5)


def test_scores_do_not_depend_on_batch_size_and_chunk() -> None:
    model, split = Tiny(), packed(5, 40, 1, 30)
    expected = run(model, split, batch_size=1, chunk=1)
    for batch_size, chunk in [(1, 512), (2, 5), (5, 3), (100, 512)]:
        score = run(model, split, batch_size, chunk)
        assert score.document_sums["document_hits"] == expected.document_sums["document_hits"]
        assert score.loss == pytest.approx(expected.loss, rel=1e-6)


def test_no_more_logits_exist_at_a_time_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    genuine = torch.log_softmax

    def watched(logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
        sizes.append(len(logits))
        return genuine(logits, *arguments, **options)

    monkeypatch.setattr(torch, "log_softmax", watched)
    run(Tiny(), packed(30), batch_size=4, chunk=10)
    assert sizes == [10, 10, 4, 6]


def test_a_model_is_scored_without_dropout_and_left_in_the_mode_it_was_in() -> None:
    model, split = Tiny(), packed(30)
    for training in (True, False):
        model.train(training)
        assert run(model, split) == run(model, split)
        assert model.training is training
        assert all(parameter.grad is None for parameter in model.parameters())


# --- a part of a split


def test_a_part_is_whole_rows_scored_as_in_the_whole() -> None:
    """Of 65 scored tokens in rows of 6, the last of 5, 20 tokens are asked for: four rows."""
    split, model = packed(20, 30, 16), Tiny()
    rows = choose_rows(split, LENGTH, 20)
    assert len(rows) == 4
    assert list(rows) == sorted(set(rows))
    whole = score_stream(model, split, sequence_length=LENGTH, batch_size=2, chunk=512)
    kept = [i for row in rows for i in range(row * LENGTH, min(65, (row + 1) * LENGTH))]
    part = score_stream(model, split, sequence_length=LENGTH, batch_size=2, chunk=512, rows=rows)
    assert part.nll == pytest.approx(whole.nll[kept], rel=1e-5)
    assert list(part.rank) == list(whole.rank[kept])
    score = evaluate(model, split, sequence_length=LENGTH, batch_size=2, chunk=512, tokens=20)
    assert score.tokens == len(kept)
    assert score.loss == pytest.approx(float(whole.nll[kept].mean()), rel=1e-5)
    assert score.bytes == round(1000 * len(kept) / 65)
    edges = [0, 19, 49, 65]
    for document, (start, stop) in enumerate(pairwise(edges)):
        mine = [i for i in kept if start <= i < stop]
        assert score.document_tokens[document] == len(mine)
        assert score.document_sums["document_hits"][document] == whole.hit[mine].sum()
    score.check()


def test_rows_of_a_part_are_chosen_by_their_content() -> None:
    split = packed(6 * 40 + 1)
    rows = choose_rows(split, LENGTH, 60)
    assert len(rows) == 10
    assert list(rows) != list(range(10))
    assert set(rows) < set(choose_rows(split, LENGTH, 120))  # a larger part has the smaller one
    order = np.random.default_rng(3).permutation(40)  # the same rows in another order
    moved = np.concatenate([split.tokens[:1], split.tokens[1:].reshape(40, LENGTH)[order].ravel()])
    there = choose_rows(replace(split, tokens=moved), LENGTH, 60)
    assert sorted(order[there]) == list(rows)


@pytest.mark.parametrize("tokens", [65, 66, 10_000])
def test_a_part_that_is_as_large_as_the_split_is_the_split(tokens: int) -> None:
    split, model = packed(20, 30, 16), Tiny()
    whole = evaluate(model, split, sequence_length=LENGTH, batch_size=2, chunk=512)
    assert evaluate(model, split, sequence_length=LENGTH, batch_size=2, chunk=512, tokens=tokens) == whole


def test_beginning_of_sequence_tokens_do_not_count_in_a_part() -> None:
    split = replace(packed(20, 30, 16), bos=3)
    model = Tiny()
    rows = choose_rows(split, LENGTH, 30)
    score = evaluate(model, split, sequence_length=LENGTH, batch_size=2, chunk=512, tokens=30)
    positions = [i for row in rows for i in range(row * LENGTH, min(65, (row + 1) * LENGTH))]
    assert score.tokens == sum(split.tokens[1 + i] != 3 for i in positions) < len(positions)
    whole = evaluate(model, split, sequence_length=LENGTH, batch_size=2, chunk=512)
    assert score.bytes == round(1000 * score.tokens / whole.tokens)
    score.check()


# --- the standard error


def of(documents: list[list[int]]) -> Score:
    """Summarise hits by document; the first document has one token more, which is not scored."""
    hits = np.array([hit for document in documents for hit in document], np.bool_)
    lengths = [len(document) for document in documents]
    starts = np.concatenate([[0], 1 + np.cumsum(lengths)]).astype(np.int64)
    values = TokenValues(np.ones(len(hits)), hits, np.where(hits, 0, 9))
    return summarise(values, PackedSplit(np.zeros(len(hits) + 1, np.uint16), starts, 10))


def test_the_clustered_error_equals_a_naive_implementation() -> None:
    rng = np.random.default_rng(5)
    documents = [list(rng.random(rng.integers(1, 40)) < rng.random()) for _ in range(50)]
    total = sum(map(len, documents))
    accuracy = sum(map(sum, documents)) / total
    spread = sum(sum(hit - accuracy for hit in document) ** 2 for document in documents)
    score = of(documents)
    assert score.accuracy == pytest.approx(accuracy)
    assert score.stderr == pytest.approx(math.sqrt(spread * 50 / 49) / total)


def test_with_one_token_a_document_the_error_is_that_of_independent_tokens() -> None:
    score = of([[1], [0], [0], [1], [1], [1], [0], [1]])
    assert score.stderr == pytest.approx(np.std([1, 0, 0, 1, 1, 1, 0, 1], ddof=1) / math.sqrt(8))


def test_with_documents_of_one_length_the_error_is_that_of_their_means() -> None:
    documents = [[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0]]
    means = [np.mean(document) for document in documents]
    assert of(documents).stderr == pytest.approx(np.std(means, ddof=1) / math.sqrt(5))


def test_repeating_tokens_within_documents_does_not_shrink_the_error() -> None:
    documents = [[1, 0], [0, 0], [1, 1], [0, 1]]
    assert of([document * 10 for document in documents]).stderr == pytest.approx(of(documents).stderr)


def test_documents_that_are_all_alike_have_no_error_and_a_single_one_has_none_defined() -> None:
    assert of([[1, 0], [0, 1], [1, 0]]).stderr == 0.0
    assert of([[1, 0, 1]]).stderr is None


def test_bits_per_byte_is_the_total_in_bits_over_the_bytes() -> None:
    # 16 tokens of ln 8 nats are 48 bits; over 12 bytes that is 4.
    split = PackedSplit(np.zeros(17, np.uint16), np.array([0, 17]), 12)
    values = TokenValues(np.full(16, math.log(8)), np.zeros(16, np.bool_), np.full(16, 9))
    score = summarise(values, split)
    assert score.values["bits_per_byte"] == pytest.approx(4.0)
    assert score.loss == pytest.approx(math.log(8))


def test_a_headline_names_split_domain_and_measure() -> None:
    score = of([[1, 0], [1, 1]])
    point = flatten_scores({"py": score})
    assert (point["validation/py/accuracy"], point["validation/py/loss"]) == (0.75, 1.0)
    assert set(point) == {f"validation/py/{metric.key}" for metric in METRICS.values()}


# --- chunked loss against full logits


@pytest.mark.parametrize("chunk", [1, 5, 12, 512])
def test_token_scores_equal_full_logits(chunk: int) -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(3, 4, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    targets = torch.randint(VOCABULARY, (3, 4))
    logits = states @ weight.T
    targets[0] = logits[0].argmax(-1)
    scores = score_states(states, weight, targets, chunk)
    expected = functional.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1), reduction="none")
    torch.testing.assert_close(scores.nll, expected)
    assert torch.equal(scores.hit, (logits.argmax(-1) == targets).view(-1))
    assert scores.hit[:4].all()
    assert scores.rank is None
    ranked = score_states(states, weight, targets, chunk, ranks=True)
    assert torch.equal(ranked.nll, scores.nll)
    assert torch.equal(ranked.hit, scores.hit)
    place = logits.view(-1, VOCABULARY).argsort(-1, descending=True)
    assert torch.equal(ranked.rank, (place == targets.view(-1, 1)).int().argmax(-1))


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("shape", [(2, 5), (3, 400)])  # less than one chunk, and several with a rest
def test_the_loss_and_its_gradients_equal_cross_entropy_of_full_logits(trainable: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    targets = torch.randint(VOCABULARY, shape)
    start, matrix = torch.randn(*shape, HIDDEN), torch.randn(VOCABULARY, HIDDEN)

    def gradients(chunked: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        states = start.clone().requires_grad_()
        weight = matrix.clone().requires_grad_(trainable)
        if chunked:
            loss = compute_next_token_loss(states, weight, targets)
        else:
            loss = functional.cross_entropy((states @ weight.T).view(-1, VOCABULARY), targets.view(-1))
        (3 * loss).backward()
        return loss.detach(), states.grad, weight.grad

    loss, by_states, by_weight = gradients(chunked=True)
    expected, expected_by_states, expected_by_weight = gradients(chunked=False)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(by_states, expected_by_states)
    assert (by_weight is not None) is trainable
    if trainable:
        torch.testing.assert_close(by_weight, expected_by_weight)


def test_the_loss_is_computed_in_fp32_from_bf16_states() -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(2, 9, HIDDEN).bfloat16(), torch.randn(VOCABULARY, HIDDEN)
    targets = torch.randint(VOCABULARY, (2, 9))
    loss = compute_next_token_loss(states, weight, targets)
    assert loss.dtype == torch.float32
    expected = functional.cross_entropy((states.float() @ weight.T).view(-1, VOCABULARY), targets.view(-1))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kinds", [2, 4, 1000])
def test_hits_are_those_of_the_first_of_the_most_likely(kinds: int) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randint(kinds, (300, 9)).float(), torch.randint(9, (300,))
    logits[0] = -torch.inf
    expected = logits.argmax(-1) == labels
    assert 0 < expected.sum() < 300
    assert torch.equal(find_hits(logits.clone(), labels), expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_chunks_in_one_piece_of_memory_give_the_bits_of_chunks_apart(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    words, chunk = PART + 3, 40
    states = torch.randn(2 * chunk + 7, HIDDEN, requires_grad=True)
    weight = torch.randn(words, HIDDEN).mul_(0.2).requires_grad_()
    targets = torch.randint(words, (len(states),))
    loss: Tensor = ChunkedLoss.apply(states, weight, targets, kind, chunk)  # type: ignore[no-untyped-call]
    found = [loss.detach(), *torch.autograd.grad(loss, (states, weight))]
    narrow, total, for_states, for_weight = weight.detach().to(kind), torch.zeros(()), [], torch.zeros_like(weight)
    for piece, wanted in zip(states.detach().to(kind).split(chunk), targets.split(chunk), strict=True):
        scores = (piece @ narrow.T).float().log_softmax(-1)
        total -= scores.gather(1, wanted[:, None]).sum()
        slope = (scores.exp() - functional.one_hot(wanted, words)).div(len(states)).to(kind)
        for_states.append((slope @ narrow).float())
        # Part by part here too: the order of a product's sums may depend on its shape.
        for_weight += torch.cat([(part.T @ piece).float() for part in slope.split(PART, dim=1)])
    for mine, expected in zip(found, [total / len(states), torch.cat(for_states), for_weight], strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("trains", [False, True])
def test_the_loss_in_bf16_is_close_to_that_in_fp32_and_sums_in_fp32(trains: bool) -> None:
    torch.manual_seed(0)
    tokens = 2 * CHUNK + 7
    states = torch.randn(1, tokens, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN).mul_(0.2).requires_grad_(trains)
    targets = torch.randint(VOCABULARY, (1, tokens))
    found = {}
    for precision in ("fp32", "bf16"):
        states.grad = weight.grad = None
        loss = compute_next_token_loss(states, weight, targets, precision=precision)
        (3.0 * loss).backward()  # type: ignore[no-untyped-call]
        assert loss.dtype == torch.float32
        assert (weight.grad is not None) is trains
        found[precision] = [part for part in (loss.detach(), states.grad, weight.grad) if part is not None]
    (loss, *slopes), (expected, *expected_slopes) = found["bf16"], found["fp32"]
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    for slope, wanted in zip(slopes, expected_slopes, strict=True):
        assert (slope - wanted).norm() < 0.01 * wanted.norm()


def test_states_times_head_are_the_logits_of_a_real_model(shared_world: Any) -> None:
    from mode.backbone.load import load_model
    from mode.config.backbone import Backbone

    model = load_model(Backbone(name="pico", path=str(Path(shared_world.root) / "pico")))
    rows = torch.randint(200, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(
            compute_hidden_states(model, rows) @ find_head(model).T, model(input_ids=rows).logits
        )


def test_a_loss_that_is_not_finite_is_refused_with_what_may_be_done() -> None:
    score = Score({"accuracy": 0.5, "loss": float("nan")}, None, 2, None, (2,), {})
    with refused("d is nan", suggestion="train.lr"):
        check_finite({"d": score}, trained=True)
    with refused("d is nan", "weights"):
        check_finite({"d": score}, trained=False)
