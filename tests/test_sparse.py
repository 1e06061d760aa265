"""Gates that leave branches out: what is saved, and that outputs and gradients are those of all branches run whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from mode import config
from mode.cost import layer_shape
from mode.flop_count import Counter
from mode.loss import hidden_states
from mode.model import make_modular
from mode.modular import blocks_of
from mode.settings import GateSettings
from mode.sparse import WHOLE, can_skip, run_kept
from tests.families import FAMILIES, VOCABULARY, make_model

IDS = torch.randint(2, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(5))

P = {"top_p": 0.6}


def modular(family: str = "llama", experts: int = 5, layers: int = 1, **settings: Any) -> Any:
    """Return a modular model whose gates choose in every way."""
    torch.manual_seed(1)
    model = make_modular(
        make_model(family),
        experts=[str(number) for number in range(experts)],
        num_blocks=2,
        expert_layers=layers,
        gate=GateSettings(**settings),
    )
    for block in blocks_of(model):
        torch.nn.init.normal_(block.gate.weight, std=3.0)
    return model


def passed(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Return what comes out of a decoder, the gradients of its weights, and the operations of both passes."""
    model.zero_grad(set_to_none=True)
    with Counter() as counter:
        states = hidden_states(model, IDS)
        states.backward(torch.randn(states.shape, generator=torch.Generator().manual_seed(2)))
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return states.detach(), grads, counter.total


def both(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Return what is found with tokens left out, and with all."""
    some = passed(model)
    monkeypatch.setattr("mode.modular.can_skip", lambda *_: False)
    return some, passed(model)


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 1}, *(pytest.param(each, marks=pytest.mark.slow) for each in ({"top_k": 2, "renormalize": False}, P))],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_whole_branches(
    family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (states, grads, flops), (expected, known, most) = both(modular(family, **settings), monkeypatch)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    assert grads.keys() == known.keys()
    scale = max(float(each.abs().max()) for each in known.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, known[name], rtol=1e-4, atol=1e-5 * scale, msg=name)
    assert flops == most if family in WHOLE else flops < 0.9 * most


def test_layers_before_the_last_run_on_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    (states, grads, flops), (expected, known, most) = both(modular(layers=2, top_k=1), monkeypatch)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, known[name], rtol=1e-4, atol=1e-4, msg=name)
    assert flops < most


def test_what_nobody_keeps_has_gradients_of_zero_and_is_not_scored() -> None:
    model = modular(experts=2, top_k=1)
    for block in blocks_of(model):
        with torch.no_grad():
            block.gate.bias[2] = -1e4
    _, grads, _ = passed(model)
    unused = [grad for name, grad in grads.items() if ".experts.1." in name]
    assert len(unused) == sum(len(list(block.experts[1].parameters())) for block in blocks_of(model))
    assert all(not grad.any() for grad in unused)
    for block in blocks_of(model):
        block.experts[1] = torch.nn.ModuleList([torch.nn.Identity()])  # would not take what layers are given
    with torch.no_grad():
        hidden_states(model, IDS)
        alone = blocks_of(model)[0]
        states = torch.randn(*IDS.shape, alone.gate.in_features)
        alone.gate.bias[2] = -1e4
        assert not alone.mix(states, [((), {})], some=[2]).any()  # as a process does that has no other branch


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
        output, _ = run_kept([layer], states, [call_of(model, states)], kept, count)
        forward = counter.total
        if output.requires_grad:
            output.backward(torch.randn_like(output))
    shape = layer_shape(layer, about)
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
    return config.compose([*fresh, *overrides])
