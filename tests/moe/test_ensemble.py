"""Models mixed in probability: what their weights know, and that a cache changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mode.config.compose import compose
from mode.config.method import Choice
from mode.evaluation.likelihood import Text, compute_log_likelihoods
from mode.gating.router import Posterior
from mode.moe.clusters import ClusterWeights, cut_rows, find_clusters
from mode.moe.ensemble import Ensemble, mix_probabilities, shift
from mode.ops.loss import compute_hidden_states, find_head, score_states, score_tokens
from mode.runs.execute import execute
from mode.runs.prepare import prepare_run
from tests.conftest import World
from tests.support.families import VOCABULARY, check_generation, make_model
from tests.support.refusals import refused

IDS = torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
TARGETS = torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(6))


def members(count: int, family: str = "llama") -> list[Any]:
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = make_model(family)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value) * 0.2)  # members that say different things
        made.append(model.eval())
    return made


def ensemble(count: int = 3, family: str = "llama", window: int | None = None, **settings: Any) -> Ensemble:
    return Ensemble(members(count, family), Posterior(Choice(**settings), window)).eval()


@torch.no_grad()
def probabilities(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids).logits.double().softmax(-1)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_weights_are_the_posterior_of_the_prefix_computed_by_hand(window: int | None) -> None:
    """Of the prefix's last tokens, with a window. A token's likelihood is known once it has been read."""
    model = ensemble(window=window)
    each = torch.stack([probabilities(one) for one in model.members])
    expected = torch.zeros_like(each[0])
    for row in range(2):
        for place in range(12):
            read = range(0 if window is None else max(0, place - window), place)
            scores = [sum(one[row, before, IDS[row, before + 1]].log() for before in read) for one in each]
            weights = torch.stack([torch.as_tensor(score, dtype=torch.float64) for score in scores]).softmax(0)
            expected[row, place] = sum(weight * one[row, place] for weight, one in zip(weights, each, strict=True))
    torch.testing.assert_close(probabilities(model), expected, rtol=1e-5, atol=1e-8)


def test_equal_weights_are_the_mean_of_probabilities_and_not_of_logits() -> None:
    made = members(2)
    mean = sum(probabilities(one) for one in made) / 2
    torch.testing.assert_close(probabilities(Ensemble(made, None)), mean, rtol=1e-5, atol=1e-8)
    one, other = torch.tensor([0.9, 0.05, 0.05]), torch.tensor([0.001, 0.5, 0.499])
    logs = torch.stack([one, other]).log()
    assert mix_probabilities(logs, torch.tensor([0.5, 0.5])).argmax() == 0
    assert logs.mean(0).argmax() == 1


@pytest.mark.parametrize("settings", [{}, {"top_k": 1}, {"top_k": 2}])
def test_alike_members_are_that_model_and_one_member_too(settings: dict[str, Any]) -> None:
    one, *_ = members(1)
    expected = probabilities(one)
    for count in (1, 3):
        made = Ensemble([*members(1)] * count, Posterior(Choice(**settings)))
        torch.testing.assert_close(probabilities(made), expected, rtol=1e-5, atol=1e-8)


def test_a_mixture_is_at_least_as_likely_as_the_weighted_mean_says() -> None:
    model = ensemble()
    found = -model.score_tokens(IDS, TARGETS).nll
    each = torch.stack(
        [-score_states(compute_hidden_states(one, IDS), find_head(one), TARGETS).nll for one in model.members],
        -1,
    )
    weights = model.weigh(model.sum_evidence(shift(each.view(2, 12, 3).double()))).flatten(0, 1)
    assert (found >= (weights * each).sum(-1) - 1e-5).all()
    assert (found <= each.max(-1).values + 1e-5).all()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunk", [5, 12, 100])
def test_scores_are_those_of_the_forward_pass_however_they_are_chunked(chunk: int, window: int | None) -> None:
    """What follows in a text is its next tokens, so here they are the same."""
    model = ensemble(window=window)
    inputs, targets = IDS[:, :-1], IDS[:, 1:]
    scores = score_tokens(model, inputs, targets, chunk)
    logs = probabilities(model, inputs).log()
    expected = -logs.gather(-1, targets[..., None]).flatten()
    torch.testing.assert_close(scores.nll.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.hit, (logs.argmax(-1) == targets).flatten())


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
def test_under_autocast_decoders_are_in_bf16_and_heads_in_fp32(count: int) -> None:
    model: Any = ensemble(count) if count > 1 else members(1)[0]
    inputs, targets = IDS[:, :-1], IDS[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        found = score_tokens(model, inputs, targets, 5).nll
        states = model.compute_states(inputs) if count > 1 else [compute_hidden_states(model, inputs)]
    heads = [find_head(one) for one in (model.members if count > 1 else [model])]
    logs = torch.stack([(part.float() @ head.T).log_softmax(-1) for part, head in zip(states, heads, strict=True)])
    each = logs.gather(-1, targets[None, ..., None])[..., 0].movedim(0, -1).double()
    weights = model.weigh(model.sum_evidence(shift(each))) if count > 1 else torch.ones(1)
    expected = (weights * each.exp()).sum(-1).log().flatten()
    torch.testing.assert_close(-found.double(), expected, rtol=1e-5, atol=1e-5)
    assert (score_tokens(model, inputs, targets, 5).nll - found).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2"])
@pytest.mark.parametrize("settings", [{}, {"top_k": 1}, {"window": 4}])
def test_decoding_with_a_cache_is_the_same(family: str, settings: dict[str, Any]) -> None:
    model = ensemble(2, family, **settings)
    full = model(input_ids=IDS).logits
    steps, cache = [], None
    with torch.no_grad():
        for piece in (IDS[:, :5], IDS[:, 5:6], IDS[:, 6:9], IDS[:, 9:]):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert (torch.cat(steps, 1) - full).abs().max() < 1e-4


@pytest.mark.slow
def test_generation_with_padding_and_beams_is_that_without_a_cache() -> None:
    model = ensemble()
    check_generation(model, IDS)


def test_a_packed_text_does_not_know_what_is_beside_it() -> None:
    model = ensemble()
    texts = [Text(row.tolist()) for row in IDS]
    together = compute_log_likelihoods(model, texts, row=64, batch_size=2)
    for text, found in zip(texts, together, strict=True):
        (alone,) = compute_log_likelihoods(model, [text], row=1, batch_size=1)
        assert found.total == pytest.approx(alone.total, rel=1e-5)


def test_rows_are_clustered_by_their_tokens_into_clusters_of_one_size() -> None:
    random = np.random.default_rng(0)
    common = random.integers(0, 5, (60, 8))
    kinds = random.permutation(np.repeat([0, 1, 2], 20))
    own = 5 + 10 * kinds[:, None] + random.integers(0, 10, (60, 12))
    rows = np.concatenate([common, own], 1).astype(np.uint16)
    vectors, centres, members = find_clusters(rows, 3, 40)
    assert (vectors.shape[0], centres.shape[0]) == (40, 3)
    assert sorted(members.count(number) for number in range(3)) == [20, 20, 20]
    found = {(int(kind), member) for kind, member in zip(kinds, members, strict=True)}
    assert len(found) == 3  # each kind is a cluster
    again = find_clusters(rows, 3, 40)
    assert torch.equal(vectors, again[0])
    assert members == again[2]
    assert sorted(np.bincount(find_clusters(rows[:50], 4, 40)[2])) == [12, 12, 13, 13]


def near(**settings: Any) -> Ensemble:
    torch.manual_seed(9)
    judge = ClusterWeights(torch.randn(VOCABULARY, 6), torch.randn(3, 6), 0.3, Choice(**settings))
    return Ensemble(members(3), judge).eval()


def test_a_text_is_weighed_by_its_distance_to_the_centres_computed_by_hand() -> None:
    model = near()
    judge: Any = model.judge
    each = torch.stack([probabilities(one) for one in model.members])
    expected = torch.zeros_like(each[0])
    for row in range(2):
        for place in range(12):
            total = judge.vectors[IDS[row, : place + 1]].sum(0)
            distances = (total / total.norm() - judge.centres).square().sum(-1)
            weights = (-distances / 0.3).softmax(0).double()
            expected[row, place] = (weights[:, None] * each[:, row, place]).sum(0)
    torch.testing.assert_close(probabilities(model), expected, rtol=1e-4, atol=1e-7)
    scores = score_tokens(model, IDS[:, :-1], IDS[:, 1:], 5)
    logs = expected[:, :-1].log().gather(-1, IDS[:, 1:, None]).flatten()
    torch.testing.assert_close(scores.nll.double(), -logs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"top_k": 1}])
def test_nearness_decodes_with_a_cache_and_padding(settings: dict[str, Any]) -> None:
    model = near(**settings)
    check_generation(model, IDS)


@pytest.mark.slow
def test_branches_of_clusters_train_on_rows_of_their_own(world: World) -> None:
    run: Any = compose([*world.overrides, "method=cbtm", "budget=data"], world.conf)
    stages = run.method.needs(run)
    assert [stage.train.steps for stage in stages] == [2, 2]
    assert [stage.targets for stage in stages] == [("py", "sums")] * 2
    prepared = [prepare_run(stage) for stage in stages]
    streams = [one.method.stream(one.run, one.packed, "") for one in prepared]
    whole = cut_rows([one.split("train").tokens for one in (prepared[0].packed["py"], prepared[0].packed["sums"])], 32)
    together = np.concatenate([stream.reshape(-1, 32) for stream in streams])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, whole.tolist()))
    assert abs(len(streams[0]) - len(streams[1])) <= 32
    record = execute(run)
    assert record.happened["steps"] == 0
    assert record.happened["branches"] == ["cluster 1", "cluster 2"]


def test_a_cluster_that_there_is_not_is_refused(world: World) -> None:
    with refused("cluster=2", "num_clusters=2"):
        compose([*world.overrides, "method=cbtm-branch", "method.cluster=2"], world.conf)
