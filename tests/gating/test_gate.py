"""Gates: how logits become weights, for the paper's way and every other one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mode.config.method import GateSettings
from mode.evaluation.likelihood import Text, compute_log_likelihoods
from mode.gating.gate import Gate
from mode.gating.select import choose_branches, compute_load_balance
from mode.modular.artefact import load_experts
from mode.modular.block import find_blocks
from mode.modular.edit import swap_expert
from mode.modular.experts import extract_expert_state
from mode.modular.model import MoDEForCausalLM, make_modular
from mode.ops.loss import compute_hidden_states
from tests.support.families import VOCABULARY, check_generation, make_model
from tests.support.models import compute_auxiliary_loss
from tests.support.refusals import refused

IDS = torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
STATES = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


def gate(**settings: Any) -> Gate:
    torch.manual_seed(3)
    made = Gate(16, 3, settings=GateSettings(**settings))
    with torch.no_grad():
        made.weight.normal_()
        made.bias.normal_()
    return made.eval()


def modular(**settings: Any) -> MoDEForCausalLM:
    torch.manual_seed(1)
    model = make_modular(
        make_model("llama"),
        experts=["a", "b"],
        num_blocks=3,
        expert_layers=1,
        init="random",
        gate=GateSettings(**settings),
    )
    with torch.no_grad():
        for block in find_blocks(model):
            block.gate.weight.normal_(0, 0.5)
    return model.eval()


def logits_of(made: Gate) -> torch.Tensor:
    return torch.nn.functional.linear(STATES, made.weight, made.bias)


def test_top_k_with_renormalisation_is_the_softmax_of_the_kept_logits() -> None:
    made = gate(top_k=2)
    logits = logits_of(made)
    best = logits.topk(2, -1)
    expected = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
    torch.testing.assert_close(made(STATES), expected)


def test_top_k_without_renormalisation_keeps_the_softmax_of_all_and_sums_to_less() -> None:
    weights, full = gate(top_k=2, renormalize=False)(STATES), gate()(STATES)
    kept = weights > 0
    assert (kept.sum(-1) == 2).all()
    assert torch.equal(weights[kept], full[kept])
    assert (weights.sum(-1) < 1).all()


def test_top_k_of_every_branch_is_the_papers_gate() -> None:
    torch.testing.assert_close(gate(top_k=4)(STATES), gate()(STATES))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 1.0])
def test_top_p_keeps_the_smallest_set_of_largest_branches_that_holds_the_share(share: float) -> None:
    full = gate()(STATES).flatten(0, 1)
    kept = choose_branches(full, GateSettings(top_p=share))
    assert kept is not None
    for weights, mask in zip(full.tolist(), kept.tolist(), strict=True):
        chosen = sorted((w for w, keep in zip(weights, mask, strict=True) if keep), reverse=True)
        others = [w for w, keep in zip(weights, mask, strict=True) if not keep]
        assert sum(chosen) >= share - 1e-6
        assert sum(chosen[:-1]) < share
        assert not others or min(chosen) >= max(others)


def test_temperature_divides_the_logits() -> None:
    made = gate(temperature=2.5)
    torch.testing.assert_close(made(STATES), (logits_of(made) / 2.5).softmax(-1))


def test_norm_makes_the_gate_blind_to_scale() -> None:
    torch.testing.assert_close(gate(norm=True)(STATES), gate(norm=True)(37.0 * STATES))
    assert (gate()(STATES) - gate()(37.0 * STATES)).abs().max() > 0.1


def test_prefix_gate_sees_the_mean_up_to_its_token() -> None:
    made = gate(scope="prefix")
    means = torch.stack([STATES[:, : t + 1].mean(1) for t in range(7)], dim=1)
    torch.testing.assert_close(made(STATES), gate()(means))


def test_prefix_gate_leaves_padding_out() -> None:
    made = gate(scope="prefix")
    made.padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 2)
    torch.testing.assert_close(made(STATES)[:, 2:], gate(scope="prefix")(STATES[:, 2:]))


def test_load_balance_is_one_where_the_load_is_even_and_the_number_of_branches_where_one_has_all() -> None:
    even = torch.full((2, 5, 4), 0.25)
    assert compute_load_balance(even, None).item() == pytest.approx(1.0)
    one = torch.zeros(2, 5, 4)
    one[..., 2] = 1.0
    assert compute_load_balance(one, None).item() == pytest.approx(4.0)
    rows = torch.arange(4).repeat(6).view(4, 6)
    spread = torch.nn.functional.one_hot(rows, 4).bool() | torch.nn.functional.one_hot((rows + 1) % 4, 4).bool()
    assert compute_load_balance(torch.full((4, 6, 4), 0.25), spread).item() == pytest.approx(
        1.0
    )  # two branches per token


def test_balance_reaches_the_loop_in_training_alone() -> None:
    model = modular(top_k=1, balance=0.1)
    compute_hidden_states(model, IDS)
    assert compute_auxiliary_loss(model) is None
    compute_hidden_states(model.train(), IDS)
    extra = compute_auxiliary_loss(model)
    assert extra is not None
    assert 0.29 < extra.item() < 0.3 * 3  # three gates, between even and all on one branch
    extra.backward()
    assert all(block.gate.weight.grad.abs().sum() > 0 for block in find_blocks(model))
    assert compute_auxiliary_loss(modular().train()) is None


@pytest.mark.parametrize("settings", [{"scope": "prefix"}, {"top_k": 1}, {"top_p": 0.5, "renormalize": False}])
def test_every_gate_is_causal_and_caches(settings: dict[str, Any]) -> None:
    model, changed = modular(**settings), IDS.clone()
    changed[:, 7:] = (changed[:, 7:] + 11) % VOCABULARY
    with torch.no_grad():
        full = model(input_ids=IDS).logits
        assert torch.equal(full[:, :7], model(input_ids=changed).logits[:, :7])
        cache, steps = None, []
        for piece in (IDS[:, :5], IDS[:, 5:6], IDS[:, 6:]):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert (torch.cat(steps, dim=1) - full).abs().max() < 1e-4


def test_a_hidden_layer_is_one_more_linear_map_and_begins_with_the_bias_alone() -> None:
    made = gate(hidden=5)
    assert made.inner is not None
    assert made.weight.shape == (4, 5)
    inner = torch.nn.functional.gelu(STATES @ made.inner.weight.T + made.inner.bias)
    torch.testing.assert_close(made(STATES), (inner @ made.weight.T + made.bias).softmax(-1))
    fresh = Gate(16, 3, backbone_bias=1.0, settings=GateSettings(hidden=5))
    expected = torch.tensor([1.0, 0, 0, 0]).softmax(-1).expand(2, 7, 4)
    assert torch.equal(fresh(STATES), expected)
    fresh(STATES)[..., 0].sum().backward()
    assert fresh.weight.grad is not None
    assert fresh.weight.grad.any()


def test_experts_of_gates_with_a_hidden_layer_neither_come_nor_go(tmp_path: Path) -> None:
    model, plain = modular(hidden=4), modular()
    state = extract_expert_state(plain, 0)
    for act in (lambda: extract_expert_state(model, 0), lambda: swap_expert(model, "a", "c", state)):
        with refused("gate.hidden"):
            act()
    model.save_pretrained(tmp_path)
    with refused("gate.hidden"):
        load_experts(tmp_path)
    again = MoDEForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_gates_of_the_prefix_see_one_text_alone() -> None:
    """Packed with others, a text would be mixed by the mean of what came before it in its row."""
    model = modular(scope="prefix")
    texts = [Text(tokens) for tokens in (IDS[0].tolist(), IDS[1, :7].tolist())]
    for text, found in zip(texts, compute_log_likelihoods(model, texts, row=64, batch_size=2), strict=True):
        ids = torch.tensor([text.tokens])
        expected = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).sum()
        assert found.total == pytest.approx(expected.item(), rel=1e-5)


def test_prefix_gate_generates_with_padding_and_beams() -> None:
    model = modular(scope="prefix")
    check_generation(model, IDS)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"top_k": 1, "top_p": 0.5}, r"top_k and top_p"), ({"renormalize": False}, r"renormalize=false.*top_k or top_p")],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        GateSettings(**settings)
