"""What is computed another way on a processor: the library's bits in both directions, and its functions put back."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from mode.config.compose import compose
from mode.ops.loss import compute_hidden_states, score_tokens
from mode.ops.patch import ROTARY, Patch
from mode.ops.rms_norm import apply_rms_norm
from mode.ops.rotary import apply_rotary
from mode.ops.swiglu import FeedForwardFunction, SwiGLUFunction, apply_feed_forward, is_plain_trainable
from mode.train.step_options import StepOptions
from tests.support.families import FAMILIES, make_model

IDS = torch.randint(100, (2, 16), generator=torch.Generator().manual_seed(0))
EXCHANGED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3")
"""Families that turn as Llama does; Phi-3 and GPT-NeoX turn a part of a head, OLMo 2 casts, GPT-2 does not turn."""
NORMED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3")
"""Families that norm as Llama does; Gemma's weights are around zero, OLMo 2 casts last, others take means off."""

FED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3")
"""Families whose feed-forward layers are written as Llama's; Gemma's activation is another, which is left to it."""


def attention_of(model: Any) -> Any:
    """Return the module of the library that a decoder's layers are from."""
    return sys.modules[type(model).__module__]


def passed(model: Any, kind: torch.dtype | None) -> list[torch.Tensor]:
    """Return what comes out of a decoder, and the gradients of its weights."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", kind, enabled=kind is not None):
        states = compute_hidden_states(model, IDS)
    states.square().sum().backward()
    return [states.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_the_librarys(family: str, kind: torch.dtype | None) -> None:
    model = make_model(family)
    own = passed(model, kind)
    with Patch(model):
        assert (getattr(attention_of(model), ROTARY, None) is apply_rotary) == (family in EXCHANGED)
        assert any(type(module).forward is apply_rms_norm for module in model.modules()) == (family in NORMED)
        assert any(type(module).forward is apply_feed_forward for module in model.modules()) == (family in FED)
        ours = passed(model, kind)
    assert getattr(attention_of(model), ROTARY, None) is not apply_rotary
    assert all(type(module).forward not in (apply_rms_norm, apply_feed_forward) for module in model.modules())
    assert len(own) == len(ours) > 1
    for one, other in zip(own, ours, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_long_rows_and_fewer_keys(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 300, heads, 64).to(kind).transpose(1, 2).requires_grad_() for heads in (6, 2))
    angles = torch.randn(1, 300, 32).repeat(1, 1, 2) * 100
    found = []
    for function in (apply_rotary_pos_emb, apply_rotary):
        outputs = function(q, k, angles.cos(), angles.sin())
        slopes = [torch.randn(each.shape, generator=torch.Generator().manual_seed(1)) for each in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, (q, k), slopes)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", ["weight", "states", "both"])
def test_norms_of_what_trains_and_of_what_does_not(trains: str, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(96)
    nn.init.normal_(norm.weight).requires_grad_(trains != "states")
    states = torch.randn(2, 7, 5, 96).to(kind).transpose(1, 2).requires_grad_(trains != "weight")
    found = []
    for function in (LlamaRMSNorm.forward, apply_rms_norm):
        output = function(norm, 3.0 * states) + states  # beside what else has a gradient
        slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
        wanted = [each for each in (norm.weight, states) if each.requires_grad]
        found.append([output, *torch.autograd.grad(output, wanted, slope)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", ["gate", "up", "both"])
def test_feed_forward_layers_of_what_trains_and_of_what_does_not(trains: str, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (
        torch.randn(2, 7, 96).to(kind).mul_(4).requires_grad_(trains in (each, "both")) for each in ("gate", "up")
    )
    wanted, found, kept = [each for each in (gate, up) if each.requires_grad], [], []
    for function in (lambda one, other: nn.functional.silu(one) * other, SwiGLUFunction.apply):
        kept.append(set())
        with torch.autograd.graph.saved_tensors_hooks(lambda each: kept[-1].add(each.data_ptr()) or each, lambda _: _):
            output = function(gate, up)
        slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(kind)
        found.append([output, *torch.autograd.grad(output, wanted, slope)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert kept[1] == {gate.data_ptr(), up.data_ptr()}
    assert len(kept[0] - kept[1]) == (trains != "gate")  # the library keeps silu(gate) too


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", ["matrix", "all"])
def test_a_matrix_that_trains_keeps_no_products(trains: str, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(2, 7, 96).to(kind).mul_(4).requires_grad_(trains == "all") for _ in "ab")
    matrix = nn.Parameter(torch.randn(32, 96).to(kind))
    wanted, found, kept = [each for each in (gate, up, matrix) if each.requires_grad], [], set()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.add(each.data_ptr()) or each, lambda _: _):
        ours = FeedForwardFunction.apply(gate, up, matrix)
    for output in (ours, nn.functional.linear(nn.functional.silu(gate) * up, matrix)):
        slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(kind)
        found.append([output, *torch.autograd.grad(output, wanted, slope)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert kept == {each.data_ptr() for each in (gate, up, matrix)}


def test_a_matrix_that_is_more_than_one_is_asked_itself() -> None:
    heard, plain = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    assert is_plain_trainable(heard)
    assert not is_plain_trainable(nn.Linear(4, 4))
    assert not is_plain_trainable(nn.Sequential(plain))
    assert not is_plain_trainable(plain.requires_grad_(False))
    heard.register_forward_hook(lambda *_: None)
    assert not is_plain_trainable(heard)


def test_a_norm_that_is_a_kind_of_the_librarys_is_left_as_it_was() -> None:
    class Kind(LlamaRMSNorm):
        pass

    model, states = nn.Sequential(Kind(8)), torch.randn(8, requires_grad=True)
    with Patch(model):
        assert Kind.forward is apply_rms_norm
        model(states).sum().backward()
    assert "forward" not in vars(Kind)
    assert model[0].weight.grad.shape == (8,)


def test_it_is_put_back_when_a_pass_fails() -> None:
    model = make_model("llama")
    with pytest.raises(IndexError):
        score_tokens(model, IDS + 1000, IDS)
    assert getattr(attention_of(model), ROTARY) is apply_rotary_pos_emb


def test_steps_and_scores_are_made_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, turns, norms, feeds = make_model("llama"), [], [], []
    monkeypatch.setattr("mode.ops.rotary.RotaryFunction.apply", lambda heads, *_: turns.append(1) or heads)
    monkeypatch.setattr("mode.ops.rms_norm.RMSNormFunction.apply", lambda states, *_: norms.append(1) or states)
    monkeypatch.setattr(
        "mode.ops.swiglu.FeedForwardFunction.apply", lambda gate, up, down: feeds.append(1) or (gate * up) @ down.T
    )
    score_tokens(model, IDS, IDS)
    once = 2 * model.config.num_hidden_layers
    assert (len(turns), len(norms), 2 * len(feeds)) == (once, once + 1, once)
    with StepOptions(model, compose([]).train):
        compute_hidden_states(model, IDS)
    assert (len(turns), len(norms), 2 * len(feeds)) == (2 * once, 2 * once + 2, 2 * once)
    with StepOptions(model, compose(["train.kernels.branch_execution=batched"]).train):
        compute_hidden_states(model, IDS)
    assert (len(turns), len(norms), 2 * len(feeds)) == (2 * once, 2 * once + 2, 2 * once)


def test_within_itself_it_changes_nothing() -> None:
    model = make_model("llama")
    with Patch(model):
        with Patch(model):
            pass
        assert getattr(attention_of(model), ROTARY) is apply_rotary
        assert LlamaRMSNorm.forward is apply_rms_norm
    assert getattr(attention_of(model), ROTARY) is apply_rotary_pos_emb
    assert LlamaRMSNorm.forward is not apply_rms_norm
