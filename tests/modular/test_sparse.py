"""Gates that leave branches out: what is saved, and that outputs and gradients are those of all branches run whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from mode.backbone.shape import WHOLE_LAYERS, read_layer_shape
from mode.config.compose import compose
from mode.config.method import GateSettings
from mode.modular.block import find_blocks
from mode.modular.model import make_modular
from mode.modular.sparse import can_skip, run_some
from mode.ops.loss import compute_hidden_states
from mode.runs.forecast import Counter
from tests.support.families import FAMILIES, VOCABULARY, make_model

IDS = torch.randint(2, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(5))

P = {"top_p": 0.6}
QUICK = ("llama", "gemma2", "gpt2")
"""Families that stand for the others in the quick round."""


def modular(family: str = "llama", experts: int = 5, layers: int = 1, **settings: Any) -> Any:
    """Return a modular model whose gates choose in every way."""
    torch.manual_seed(1)
    model = make_modular(
        make_model(family),
        experts=[f"e{number}" for number in range(experts)],
        num_blocks=2,
        expert_layers=layers,
        gate=GateSettings(**settings),
    )
    for block in find_blocks(model):
        torch.nn.init.normal_(block.gate.weight, std=3.0)
    return model


def passed(model: Any, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Return what comes out of a decoder, the gradients of its weights, and the operations of both passes."""
    model.zero_grad(set_to_none=True)
    with Counter() as counter:
        states = compute_hidden_states(model, IDS.to(model.device), **options)
        states.backward(torch.randn(states.shape, generator=torch.Generator().manual_seed(2)).to(model.device))
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return states.detach(), grads, counter.total


def both(model: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Any]:
    """Return what is found with tokens left out, and with all, which is to be the same but for operations."""
    some = passed(model, **options)
    with monkeypatch.context() as patch:
        patch.setattr("mode.modular.block.can_skip", lambda *_: False)
        whole = passed(model, **options)
    torch.testing.assert_close(some[0], whole[0], rtol=1e-5, atol=1e-5)
    assert some[1].keys() == whole[1].keys()
    scale = max(float(each.abs().max()) for each in whole[1].values())
    for name, grad in some[1].items():
        torch.testing.assert_close(grad, whole[1][name], rtol=1e-4, atol=1e-5 * scale, msg=name)
    return some, whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"top_k": 1}, *(pytest.param(each, marks=pytest.mark.slow) for each in ({"top_k": 2, "renormalize": False}, P))],
)
@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in FAMILIES]
)
def test_outputs_and_gradients_are_those_of_whole_branches(
    family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, _, flops), (_, _, most) = both(modular(family, **settings), monkeypatch)
    assert flops == most if family in WHOLE_LAYERS else flops < 0.9 * most


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_leaves_out_what_a_processor_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = modular(family, layers=2, top_k=1)
    expected, _, _ = passed(model)
    (found, _, flops), (_, _, most) = both(model.to("cuda"), monkeypatch)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert flops == most if family in WHOLE_LAYERS else flops < most


def test_layers_before_the_last_run_on_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, _, flops), (_, _, most) = both(modular(layers=2, top_k=1), monkeypatch)
    assert flops < most


@pytest.mark.slow
def test_padding_and_documents_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    padding = torch.ones_like(IDS)
    padding[0, :5] = padding[1, -4:] = 0
    apart = torch.cat([torch.arange(10), torch.arange(14)]).expand_as(IDS)
    for options in ({"attention_mask": padding}, {"position_ids": apart}, {"position_ids": apart[:1]}):
        model = modular(top_k=1)
        both(model, monkeypatch, **options)
    both(modular("gemma2", top_k=1), monkeypatch, attention_mask=padding)


@pytest.mark.slow
def test_a_mask_for_all_rows_and_rows_that_do_not_keep_a_branch_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = modular(top_k=1)
    causal = torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool).tril()
    both(model, monkeypatch, attention_mask=causal)
    for number, block in enumerate(find_blocks(model)):  # every row is of a domain of its own
        chosen = torch.nn.functional.one_hot(torch.arange(len(IDS)) + number, 6).float()[:, None]
        block.gate.register_forward_hook(lambda _, __, weights, chosen=chosen: weights * 0 + chosen)
    (_, _, flops), (_, _, most) = both(model, monkeypatch)
    assert flops < most / 2
    both(model, monkeypatch, attention_mask=torch.ones_like(IDS))


@pytest.mark.slow
def test_in_bf16_both_ways_have_the_same_gradients_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = modular(top_k=1)
    with torch.autocast("cpu", torch.bfloat16):
        some, grads, _ = passed(model)
        monkeypatch.setattr("mode.modular.block.can_skip", lambda *_: False)
        whole, known, _ = passed(model)
    assert grads.keys() == known.keys()
    assert (some - whole).norm() < 0.05 * whole.norm()


def test_what_is_no_number_stays_so() -> None:
    model = modular(top_k=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[IDS[0, 3]] = torch.nan
        assert compute_hidden_states(model, IDS)[0, 3:].isnan().any()


def test_what_nobody_keeps_has_gradients_of_zero_and_is_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = modular(experts=2, top_k=1)
    for block in find_blocks(model):
        with torch.no_grad():
            block.gate.bias[2] = -1e4
    _, grads, _ = passed(model)
    unused = [grad for name, grad in grads.items() if ".experts.1." in name]
    assert len(unused) == sum(len(list(block.experts[1].parameters())) for block in find_blocks(model))
    assert all(not grad.any() for grad in unused)
    for block in find_blocks(model):
        monkeypatch.setattr(block.experts[1][0], "forward", None)
    alone = find_blocks(model)[0]
    with torch.no_grad():
        compute_hidden_states(model, IDS)
        states = torch.randn(*IDS.shape, alone.gate.in_features)
        call = call_of(make_model("llama"), states)
        mixed = alone.mix(states, [call], some=[2])  # as a process does that has no other branch
    assert mixed.shape == states.shape
    assert not mixed.any()


def call_of(model: Any, states: torch.Tensor, **changes: Any) -> Any:
    """Return what a decoder gives to a layer."""
    positions = torch.arange(states.shape[1])[None]
    options = {"position_embeddings": model.model.rotary_emb(states, positions), "position_ids": positions}
    return ((), options | {"attention_mask": None, "past_key_values": None} | changes)


def test_whole_branches_run_where_a_layer_cannot_leave_tokens_out() -> None:
    model = make_model("llama").train()
    layer, states = model.model.layers[0], torch.randn(*IDS.shape, model.config.hidden_size)
    assert can_skip([layer], [call_of(model, states)])
    assert not can_skip([layer], [call_of(model, states, past_key_values=DynamicCache())])
    assert not can_skip([layer], [call_of(model, states, attention_mask=torch.ones(IDS.shape))])  # FlashAttention's
    assert not can_skip([layer], [((torch.ones(1),), call_of(model, states)[1])])
    layer.gradient_checkpointing = True
    assert not can_skip([layer], [call_of(model, states)])
    layer.gradient_checkpointing = False
    model.config._attn_implementation = "flash_attention_2"
    assert not can_skip([layer], [call_of(model, states)])


@pytest.mark.parametrize(("family", "train"), [("llama", True), ("llama", False), ("phi3", True), ("olmo2", True)])
@pytest.mark.parametrize("upstream", [True, False])
def test_the_closed_form_is_what_torch_counts(family: str, train: bool, upstream: bool) -> None:
    model = make_model(family)
    layer, about, count = model.model.layers[0], model.config, 6
    layer.requires_grad_(train)
    states = torch.randn(*IDS.shape, about.hidden_size, requires_grad=upstream)
    kept = torch.zeros(IDS.shape, dtype=torch.bool)
    kept[:, 3 : 3 + count] = True
    with Counter() as counter:
        output, _ = run_some([layer], states, [call_of(model, states)], kept, count)
        forward = counter.total
        if output.requires_grad:
            output.backward(torch.randn_like(output))
    shape = read_layer_shape(layer, about)
    found = shape.flops_of_some(IDS.shape[1], count / IDS.shape[1], trains=train, upstream=upstream)
    assert forward / IDS.numel() == found.forward
    assert counter.total / IDS.numel() == found.total


def test_a_method_takes_less_where_branches_are_left_out() -> None:
    shapes = {k: run_of(f"method.gate.top_k={k}").method for k in ("null", "2")}
    dense, sparse = (method.cost(run_of(f"method.gate.top_k={k}")).flops.total for k, method in shapes.items())
    assert sparse < 0.6 * dense


def run_of(*overrides: str) -> Any:
    """Return a run of a modular model with sixteen experts."""
    fresh = ("method=mode", "method.start=fresh", "method.num_experts=16", "backbone=tiny")
    return compose([*fresh, *overrides])


def test_compiled_layers_run_on_as_many_rows_as_they_are_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = modular(top_k=1), []
    for block in find_blocks(model):
        chosen = torch.nn.functional.one_hot(torch.arange(len(IDS)), 6).float()[:, None]
        block.gate.register_forward_hook(lambda _, __, weights, chosen=chosen: weights * 0 + chosen)
        for layer in (layer for expert in block.experts for layer in expert):
            code = layer._call_impl
            monkeypatch.setattr(
                layer, "_compiled_call_impl", lambda x, code=code, **kw: seen.append(len(x)) or code(x, **kw)
            )
    with torch.no_grad():
        compute_hidden_states(model, IDS)
    assert set(seen) == {len(IDS)}
