"""The contract of MoDE, SFT and LoRA on every supported family of backbones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mode.backbone.load import FAMILIES as SUPPORTED
from mode.backbone.structure import find_layer_stack
from mode.modular.block import find_blocks
from mode.modular.model import MoDEForCausalLM, make_modular
from mode.ops.loss import compute_hidden_states, compute_next_token_loss, find_head, find_softcap, score_states
from tests.support.families import FAMILIES, HIDDEN, LAYERS, VOCABULARY, make_model
from tests.support.models import fingerprint_model

IDS = torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("family", FAMILIES)]


def modular(family: str, *, num_experts: int = 2, seed: int = 1, **changes: Any) -> MoDEForCausalLM:
    """Return a modular model of a family whose experts and gates are random, so that every part matters."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"num_blocks": 3, "expert_layers": 2, "init": "random", **changes}
    model = make_modular(make_model(family), experts=[f"e{i}" for i in range(num_experts)], **settings)
    with torch.no_grad():
        for block in find_blocks(model):
            block.gate.weight.normal_(0, 0.2)
            block.gate.bias.normal_(0, 0.5)
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    return model(input_ids=ids, **options).logits


def test_is_supported_and_its_layers_are_found(family: str) -> None:
    assert tuple(FAMILIES) == SUPPORTED
    trunk, name = find_layer_stack(make_model(family))
    assert len(getattr(trunk, name)) == LAYERS


def test_gate_on_backbone_gives_the_backbone(family: str) -> None:
    model = modular(family, backbone_bias=0.0)
    for block in find_blocks(model):
        with torch.no_grad():
            block.gate.weight.zero_()
            block.gate.bias.fill_(-1e4)
            block.gate.bias[0] = 0.0
    assert (logits(model) - logits(make_model(family))).abs().max() < 1e-6


def test_whole_copies_make_gates_irrelevant(family: str) -> None:
    model = modular(family, init="copy")
    assert (logits(model) - logits(make_model(family))).abs().max() < 1e-4


def test_nothing_looks_ahead(family: str) -> None:
    model, changed = modular(family), IDS.clone()
    changed[:, 7:] = (changed[:, 7:] + 11) % VOCABULARY
    assert torch.equal(logits(model)[:, :7], logits(model, changed)[:, :7])
    assert not torch.equal(logits(model)[:, 7:], logits(model, changed)[:, 7:])


def test_cached_decoding_equals_the_full_forward(family: str) -> None:
    model = modular(family)
    full, cache, steps = logits(model), None, []
    with torch.no_grad():
        for position in range(IDS.shape[1]):
            out = model(input_ids=IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert (torch.cat(steps, dim=1) - full).abs().max() < 1e-4
    assert len(cache.layers) == LAYERS + 3 * 2 * 2


def test_greedy_generation_is_the_same_with_and_without_a_cache(family: str) -> None:
    model = modular(family)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache = model.generate(IDS, **options)
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **options))
    assert with_cache.shape == (2, 20)


def test_left_padding_changes_nothing(family: str) -> None:
    model = modular(family)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
    mask = (torch.arange(15) >= 3).long().expand(2, -1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], plain)


def test_sampling_and_beams_run(family: str) -> None:
    model = modular(family)
    torch.manual_seed(0)
    options = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(IDS, do_sample=True, **options).shape == (2, 16)
    beams = model.generate(IDS, num_beams=3, do_sample=False, **options)
    assert torch.equal(beams, model.generate(IDS, num_beams=3, do_sample=False, use_cache=False, **options))


def test_added_parameters_follow_the_closed_form(family: str) -> None:
    bare = make_model(family)
    trunk, name = find_layer_stack(bare)
    per_layer = sum(parameter.numel() for parameter in getattr(trunk, name)[0].parameters())
    model = modular(family)
    added = 2 * 3 * 2 * per_layer + 3 * 3 * (HIDDEN + 1)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total - sum(parameter.numel() for parameter in bare.parameters()) == added
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == added


def test_packed_documents_with_restarting_positions_equal_separate_ones(family: str) -> None:
    model = modular(family)
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = logits(model, IDS[:1], position_ids=positions, use_cache=False)
    apart = torch.cat([logits(model, IDS[:1, :5]), logits(model, IDS[:1, 5:])], dim=1)
    assert (packed - apart).abs().max() < 1e-4


def test_saved_and_loaded_is_the_same_model(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = modular(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MoDEForCausalLM)
    assert torch.equal(logits(loaded), logits(model))
    assert fingerprint_model(loaded) == fingerprint_model(model)
    for name in ("num_blocks", "expert_layers", "experts", "gate", "backbone"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    assert loaded.config.decoder.num_hidden_layers == LAYERS
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < 4.1 * sum(parameter.numel() for parameter in model.parameters()) + 40_000  # a tied head is there once


def test_bf16_weights_and_autocast_are_close(family: str) -> None:
    model = modular(family)
    full = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        cast = logits(model).float()
    assert (cast - full).abs().mean() < 0.1 * full.abs().mean()
    low = logits(copy.deepcopy(model).bfloat16()).float()
    assert (low - full).abs().mean() < 0.2 * full.abs().mean()


def test_loss_and_scores_are_those_of_the_models_own_logits(family: str) -> None:
    model = modular(family)
    own = logits(model)[:, :-1]
    targets = IDS[:, 1:]
    with torch.no_grad():
        states = compute_hidden_states(model, IDS[:, :-1])
    expected = torch.nn.functional.cross_entropy(own.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(
        compute_next_token_loss(states, find_head(model), targets, find_softcap(model)), expected
    )
    scores = score_states(states, find_head(model), targets, cap=find_softcap(model))
    torch.testing.assert_close(scores.nll.mean(), expected)
    assert torch.equal(scores.hit, (own.argmax(-1) == targets).flatten())


def test_only_experts_and_gates_train(family: str) -> None:
    model = modular(family).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = compute_next_token_loss(
            compute_hidden_states(model, IDS[:, :-1]), find_head(model), IDS[:, 1:], find_softcap(model)
        )
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    own = set(model.own_state())
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved <= own
    assert len(moved) > 0.8 * len(own)


def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    def gradients(save_memory: bool) -> dict[str, torch.Tensor]:
        model = modular(family).train()
        if save_memory:
            model.activation_checkpointing_enable()
        compute_next_token_loss(
            compute_hidden_states(model, IDS[:, :-1]), find_head(model), IDS[:, 1:], find_softcap(model)
        ).backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    plain, saved = gradients(save_memory=False), gradients(save_memory=True)
    assert plain.keys() == saved.keys()
    for name, value in plain.items():
        torch.testing.assert_close(saved[name], value)


def method_model(method: str, family: str) -> Any:
    """Return what a baseline makes of a family's model."""
    from mode.config.compose import compose
    from mode.methods.base import Material

    run = compose([f"method={method}", "track=none"])
    return run.method.build(run, Material(backbone=lambda: make_model(family)))


@pytest.mark.parametrize("method", ["sft", "lora"])
def test_baselines_start_as_the_backbone_and_learn(family: str, method: str) -> None:
    model = method_model(method, family)
    assert (logits(model) - logits(make_model(family))).abs().max() < 1e-6
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = compute_next_token_loss(
            compute_hidden_states(model, IDS[:, :-1]), find_head(model), IDS[:, 1:], find_softcap(model)
        )
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_lora_adapts_every_attention_matrix_and_nothing_else(family: str) -> None:
    model = method_model("lora", family)
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    bare = make_model(family)
    matrices = {
        name.removesuffix(".weight")
        for name, parameter in bare.named_parameters()
        if parameter.ndim == 2 and ".att" in name.replace("self_attn", "attn")
    }
    assert adapted == matrices
    assert len(matrices) >= 2 * LAYERS
