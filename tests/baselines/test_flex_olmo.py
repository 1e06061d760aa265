"""FlexOlmo: pairs of experts trained beside a frozen model, joined without training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from baselines.flex_olmo import PUBLIC, ROWS, embed_texts, list_banks
from mode.backbone.load import load_model
from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.config.method import RouterSettings
from mode.core.files import WEIGHTS
from mode.core.tensors import list_trainable, load_tensors
from mode.gating.router import AnchoredRouter
from mode.methods.base import Material
from mode.moe.feed_forward import FeedForwardBank
from mode.runs.execute import execute, restore
from mode.runs.prepare import prepare_run
from mode.runs.texts import read_texts
from tests.conftest import World
from tests.cost.test_cost import check
from tests.support.refusals import refused

IDS = torch.tensor([[5, 17, 200, 3, 88, 41, 9, 120, 64]])


def run_of(world: World, *overrides: str) -> Any:
    return compose([*world.overrides, *overrides], world.conf)


def trained(run: Any) -> list[Path]:
    """Train the experts that a run needs; return their work folders."""
    needs = [prepare_run(stage) for stage in run.method.needs(run)]
    for stage in needs:
        execute(stage.run, weights=True)
    return [stage.folder for stage in needs]


def built(run: Any, needs: Any = ()) -> Any:
    texts = partial(read_texts, run)
    return run.method.build(run, Material(lambda: load_model(run.backbone), tuple(needs), texts=texts))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def random_router(settings: RouterSettings, count: int = 2) -> AnchoredRouter:
    torch.manual_seed(1)
    router = AnchoredRouter(torch.randn(8), torch.randn(count, 8), settings)
    with torch.no_grad():
        router.offset.copy_(torch.tensor([-0.5, -1.5])[:count])
    return router


def test_an_expert_trains_alone_beside_what_is_frozen(world: World) -> None:
    names = set(list_trainable(built(run_of(world, "method=flex-olmo-expert"))))
    assert names
    assert all(".experts.1." in name or name.endswith(("router.weight", "router.offset")) for name in names)
    every = built(run_of(world, "method=flex-olmo-expert", "method.shared=all"))
    frozen = {name for name, value in every.named_parameters() if not value.requires_grad}
    assert frozen
    assert all(".experts.0." in name or name.endswith("router.anchor") for name in frozen)


def test_a_bias_can_only_prefer_the_backbone() -> None:
    router, x = random_router(RouterSettings()), torch.randn(5, 8)
    rows = torch.cat([router.anchor, router.weight])
    bias = torch.tensor([0.0, -0.5, -1.5])
    torch.testing.assert_close(router(x), (functional.linear(x, rows) + bias).softmax(-1))
    with torch.no_grad():
        router.offset.fill_(3.0)
    torch.testing.assert_close(router(x), functional.linear(x, rows).softmax(-1))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_mixture_is_the_librarys_block(top_k: int) -> None:
    from transformers import FlexOlmoConfig
    from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoSparseMoeBlock
    from transformers.models.llama.modeling_llama import LlamaMLP

    shape: Any = FlexOlmoConfig(hidden_size=8, intermediate_size=12, num_experts=3, num_experts_per_tok=top_k)
    shape.mlp_bias = False
    router = random_router(RouterSettings(top_k=top_k, renormalize=False))
    with torch.no_grad():
        router.offset.zero_()  # the library's router has no bias
    made = FeedForwardBank([LlamaMLP(shape) for _ in range(3)], router)
    theirs: Any = FlexOlmoSparseMoeBlock(shape)
    with torch.no_grad():
        theirs.gate.weight.copy_(torch.cat([router.anchor, router.weight]))
        for index, expert in enumerate(made.experts):
            assert isinstance(expert, LlamaMLP)
            theirs.experts.gate_up_proj[index].copy_(torch.cat([expert.gate_proj.weight, expert.up_proj.weight]))
            theirs.experts.down_proj[index].copy_(expert.down_proj.weight)
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(made(x), theirs(x))


def test_rows_of_the_router_begin_as_embeddings_of_texts(world: World) -> None:
    run = run_of(world, "method=flex-olmo-expert", "targets=[py]")
    backbone = load_model(run.backbone).eval()
    public, own = embed_texts(backbone, read_texts(run, ROWS))
    assert public.norm().item() == pytest.approx(1.0) == own.norm().item()
    length = run.train.sequence_length
    tokens = torch.from_numpy(prepare_run(run).packed["py"].split("train").tokens[: ROWS * length].astype("int64"))
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    with torch.no_grad():
        states = backbone(input_ids=rows, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(own, functional.normalize(states.mean((0, 1)), dim=0), rtol=1e-4, atol=1e-5)
    for _, bank in list_banks(built(run)):
        assert torch.equal(bank.router.get_parameter("anchor")[0], public)
        assert torch.equal(bank.router.weight[0], own)


@pytest.mark.slow
def test_joined_experts_are_those_that_were_trained(world: World) -> None:
    run = run_of(world, "method=flex-olmo")
    folders = trained(run)
    mixture, backbone = built(run, folders), load_model(run.backbone)
    states = [load_tensors(folder / WEIGHTS)[0] for folder in folders]
    assert torch.equal(*(load_tensors(folder / PUBLIC)[0]["public"] for folder in folders))
    for path, bank in list_banks(mixture):
        assert [len(bank.experts), len(bank.router.weight)] == [3, 2]
        for name, value in bank.experts[0].named_parameters():
            assert torch.equal(value, backbone.get_parameter(f"{path}.{name}"))
        for number, state in enumerate(states):
            for name, value in bank.experts[number + 1].named_parameters():
                assert torch.equal(value, state[f"{path}.experts.1.{name}"])
            assert torch.equal(bank.router.weight[number], state[f"{path}.router.weight"][0])
            assert torch.equal(bank.router.get_parameter("offset")[number], state[f"{path}.router.offset"][0])
    assert not list_trainable(mixture)


@pytest.mark.slow
def test_a_mixture_of_one_expert_is_its_pair(world: World) -> None:
    run = run_of(world, "method=flex-olmo", "targets=[py]")
    (stage,) = run.method.needs(run)
    mixture = built(run, trained(run))
    torch.testing.assert_close(logits(mixture), logits(restore(prepare_run(stage))), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_shared_weights_are_averaged(world: World) -> None:
    run = run_of(world, "method=flex-olmo", "method.expert.shared=all")
    folders = trained(run)
    mixture = built(run, folders)
    states = [load_tensors(folder / WEIGHTS)[0] for folder in folders]
    shared = [name for name in states[0] if ".experts." not in name and ".router." not in name]
    assert [any(part in name for name in shared) for part in ("self_attn", "embed")] == [True, True]
    for name in shared:
        assert not torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(mixture.get_parameter(name), (states[0][name] + states[1][name]) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["none", "embeddings", "all"])
def test_the_cost_of_an_expert_is_that_of_the_model(world: World, shared: str) -> None:
    run = run_of(world, "method=flex-olmo-expert", f"method.shared={shared}")
    check(run, built(run))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("method.router.top_k=null", "method.router.renormalize=true")])
def test_the_cost_of_the_mixture_is_that_of_the_model(world: World, settings: tuple[str, ...]) -> None:
    run = run_of(world, "method=flex-olmo", "method.tune_router=true", *settings)
    folders = trained(run)
    check(run, built(run, folders))
    still = replace_settings(run, method=replace_settings(run.method, tune_router=False))
    tuned, cost = run.method.cost(run), still.method.cost(still)
    assert (cost.flops.backward, cost.trainable) == (0.0, 0)
    assert (cost.flops.forward, cost.total, cost.active) == (tuned.flops.forward, tuned.total, tuned.active)


def test_what_is_not_an_expert_is_refused(world: World) -> None:
    run = run_of(world, "method=flex-olmo")
    other = replace_settings(run.method, expert={"_target_": "baselines.sft.SFT", "lr": 1.0e-3})
    with refused("method.expert", "baselines.sft.SFT"):
        built(replace_settings(run, method=other))
    with refused("router"):
        run_of(world, "method=flex-olmo-expert", "method.router.top_k=1")
