"""Experts that change the head too: the mixed logits, what stays frozen, composing, saving, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from mode.artefacts.edit import check_mergeable, join_experts, keep_experts
from mode.artefacts.find import FoundModel, find_model
from mode.backbone.load import fingerprint_weights, load_model
from mode.config.backbone import Backbone
from mode.config.method import GateSettings
from mode.modular.artefact import load_experts
from mode.modular.block import bypass_experts, find_blocks
from mode.modular.edit import extract_backbone, swap_expert
from mode.modular.experts import compose_experts, extract_expert_state
from mode.modular.head import SCALE, ModularHead, insert_head
from mode.modular.model import MoDEForCausalLM
from mode.ops.loss import compute_hidden_states, compute_next_token_loss, find_head
from mode.runs.execute import execute
from tests.artefacts.test_write import composed
from tests.conftest import World
from tests.methods.test_anchored import noisy
from tests.modular.test_modular import IDS, force, logits, modular, pico
from tests.support.models import fingerprint_model
from tests.support.refusals import refused

RANK = ("method.head_rank=4",)


def changed(world: World, *, num_experts: int = 2, seed: int = 1, **changes: Any) -> Any:
    """Return a modular model of which every part, those of the head too, is random."""
    return noisy(modular(world, num_experts=num_experts, seed=seed, head_rank=4, **changes)).eval()


def test_a_fresh_change_of_the_head_changes_nothing(world: World) -> None:
    fresh = modular(world, head_rank=4, init="copy", num_blocks=6)  # whole copies, so whatever the gates say
    assert torch.allclose(logits(fresh), logits(pico(world).eval()), atol=1e-5)


def test_the_logits_are_those_of_the_formula(world: World) -> None:
    model = changed(world)
    block = model.head
    states = model.base_model(input_ids=IDS).last_hidden_state
    weights = (states @ block.gate.weight.T + block.gate.bias).softmax(-1)
    expected = states @ pico(world).get_output_embeddings().weight.T
    for index, expert in enumerate(block.experts):
        expected = expected + SCALE * weights[..., index + 1, None] * (
            states @ expert.down.weight.T @ expert.up.weight.T
        )
    assert torch.allclose(logits(model), expected, atol=1e-5)
    loss = compute_next_token_loss(compute_hidden_states(model, IDS[:, :-1]), find_head(model), IDS[:, 1:])
    whole = functional.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    loss.backward()
    for part in (*block.experts.parameters(), *block.gate.parameters()):
        assert part.grad.abs().max() > 0
    assert model.get_output_embeddings().weight.grad is None


def test_without_its_experts_a_model_is_its_backbone(world: World) -> None:
    model, bare = changed(world), pico(world).eval()
    with bypass_experts(model):
        assert torch.equal(compute_hidden_states(model, IDS) @ find_head(model).T, logits(bare))
    assert not torch.allclose(logits(model), logits(bare))
    force(model, 0)
    assert torch.allclose(logits(model), logits(bare), atol=1e-6)
    before = fingerprint_model(pico(world))
    restored = extract_backbone(model)
    assert fingerprint_model(restored) == before
    assert torch.equal(logits(restored), logits(bare))


def test_masking_all_experts_but_one_gives_its_stage_one_model(world: World) -> None:
    alone = [changed(world, num_experts=1, seed=seed) for seed in (1, 2)]
    both = modular(world, head_rank=4)
    compose_experts(both, [extract_expert_state(model, 0) for model in alone], "odds")
    for index, model in enumerate(alone):
        with torch.no_grad():
            kept = [block.gate.bias.clone() for block in find_blocks(both)]
            for block in find_blocks(both):
                block.gate.bias[2 - index] = -1e4
            assert torch.allclose(logits(both), logits(model), atol=1e-5)
            for block, bias in zip(find_blocks(both), kept, strict=True):
                block.gate.bias.copy_(bias)


@pytest.mark.parametrize("embed", [True, False])
def test_a_saved_model_is_the_same(world: World, tmp_path: Path, embed: bool) -> None:
    model = changed(world)
    source: dict[str, Any] = {"name": "pico", "path": str(world.conf.parent / "pico"), "revision": None}
    model.config.backbone = source | {"fingerprint": fingerprint_weights(Backbone(**source))}
    model.save_pretrained(tmp_path / "model", embed=embed)
    again = MoDEForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(again), logits(model))
    tied = pico(world).config.tie_word_embeddings
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    state = extract_expert_state(model, 1)
    found = load_experts(tmp_path / "model")["e1"].tensors
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.slow
def test_experts_leave_join_and_take_a_place(world: World) -> None:
    from tests.modular.test_artefact import stage_one

    _, folder = stage_one(world, "py", *RANK)
    _, other = stage_one(world, "sums", *RANK)
    record, recalled = composed(world, *RANK, "train.steps=0", f"method.experts=['{folder}', '{other}']")
    before = logits(recalled.model)
    again = join_experts(FoundModel(keep_experts(recalled, ["py"]), recalled.tokenizer, recalled.place, None), other)
    assert (logits(again) - before).abs().max() < 1e-5
    assert sum(parameter.numel() for parameter in again.parameters()) == record.happened["parameters"]["total"]
    swap_expert(again, "sums", "new", load_experts(other)["sums"].tensors)
    assert torch.allclose(logits(again), before, atol=1e-5)
    last = f"{again.config.num_blocks}."
    plain = {name: value for name, value in load_experts(other)["sums"].tensors.items() if not name.startswith(last)}
    with refused(f"{last}gate"):
        swap_expert(again, "new", "sums", plain)


@pytest.mark.slow
def test_a_run_keeps_trains_and_scores_the_changes_of_the_head(world: World) -> None:
    from mode.config.compose import compose

    run = compose([*world.overrides, "method=mode", *RANK, "budget=data", "train.steps=6"], world.conf)
    record = execute(run, weights=True)
    assert record.happened["forecast"]["flops"] == pytest.approx(record.happened["flops"], rel=0.01)
    model: Any = find_model(record.id, world.root / "runs").model
    assert all(expert.up.weight.abs().max() > 0 for expert in model.head.experts)
    blocks = record.happened["gates"]["py"]["mean"]
    assert len(blocks) == run.method.num_blocks + 1  # type: ignore[attr-defined]


def test_a_change_of_the_head_cannot_be_merged(world: World) -> None:
    with refused("method.head_rank"):
        check_mergeable(modular(world, num_experts=1, num_blocks=6, head_rank=4))


@pytest.mark.slow
def test_experts_that_change_the_head_go_with_others_that_do(world: World) -> None:
    from tests.modular.test_artefact import stage_one

    _, folder = stage_one(world, "py")
    with refused("method.head_rank=0", "head_rank=4"):
        composed(world, *RANK, f"method.experts=['{folder}']")


def test_what_a_change_of_the_head_does_not_know_is_refused(world: World) -> None:
    from mode.config.compose import compose

    with refused("head_rank", "gate.scope=token"):
        compose([*world.overrides, "method=mode", *RANK, "method.gate.scope=prefix"], world.conf)
    model = load_model(compose(world.overrides, world.conf).backbone)
    biased = torch.nn.Linear(16, 257, bias=True)
    model.set_output_embeddings(biased)
    with refused("method.head_rank", "bias"):
        insert_head(model, num_experts=1, rank=4, backbone_bias=0.0, gate=GateSettings())
    assert not isinstance(model.get_output_embeddings(), ModularHead)
