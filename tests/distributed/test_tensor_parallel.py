"""Matrices in slices: gradients, steps and saved weights are those of one process, for every family with a plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mode.backbone.load import load_model
from mode.config.compose import compose
from mode.distributed.choose import choose_layout
from mode.distributed.tensor_parallel import TensorParallel
from mode.methods.base import Material
from mode.modular.build import insert_blocks
from mode.runs.execute import execute
from tests.conftest import World
from tests.distributed.test_layouts import SCRIPT, STOPPED
from tests.support.families import FAMILIES, make_model
from tests.support.processes import together
from tests.support.refusals import refused

PLANNED = [name for name in FAMILIES if name != "gpt2"]
STEPS = """
import json, sys
from functools import partial
from pathlib import Path
import torch
from mode.config.compose import compose
from mode.core.tensors import list_trainable
from mode.distributed.tensor_parallel import TensorParallel
from mode.train.loop import forward_backward
from mode.train.objective import Objective
from mode.train.optimizer import make_optimizer
from mode.train.step_batch import StepBatch
from tests.distributed.test_tensor_parallel import PLANNED, made
run = compose(json.loads(sys.argv[1]), Path(sys.argv[2]))
make = partial(make_optimizer, lr=1e-2, scales={}, settings=run.train)
rows = torch.randint(2, 128, (2, 17), generator=torch.Generator().manual_seed(1))
for family in PLANNED:
    for modular in (False, True) if family == "llama" else (False,):
        alone, split = made(family, modular), made(family, modular)
        plain = make(alone)
        layout = TensorParallel(split)
        objective, optimizer = layout.wrap(Objective(split, run.train, None), make)
        for step in range(2):
            expected, _ = forward_backward(Objective(alone, run.train, None), StepBatch(rows), 1)
            torch.nn.utils.clip_grad_norm_(list_trainable(alone).values(), 0.1)
            with layout.enter_step():
                found, _ = forward_backward(objective, StepBatch(layout.select_rows(rows)), 1)
            layout.clip_gradients(0.1)
            assert abs(found - expected) < 1e-4, (family, modular, step)
            for (name, one), other in zip(list_trainable(alone).items(), layout.trained, strict=True):
                grad = getattr(other.grad, "full_tensor", lambda: other.grad)()
                differs = (grad - one.grad).norm() / one.grad.norm()
                assert differs < 1e-3, (family, modular, name, step, differs)
            for each in (plain, optimizer):
                each.step()
                each.zero_grad(set_to_none=True)
        layout.gather_weights(True)
        found = list_trainable(split).values()
        for (name, one), other in zip(list_trainable(alone).items(), found, strict=True):
            assert other.shape == one.shape
            assert torch.allclose(other, one, rtol=1e-2, atol=1e-3), (family, modular, name)
"""


def made(family: str, modular: bool) -> Any:
    """Return a model of a family all of which trains, or with an expert in two blocks."""
    model = make_model(family).train()
    if modular:
        model.blocks = insert_blocks(model, num_experts=1, num_blocks=2, expert_layers=2)
    return model


@pytest.mark.slow
def test_steps_in_slices_are_those_of_one_process(shared_world: World, tmp_path: Path) -> None:
    world = shared_world.at(tmp_path)
    together(2, STEPS, json.dumps([*world.overrides, "method=sft"]), str(world.conf))


@pytest.mark.parametrize(
    ("settings", "processes", "named"),
    [
        (["method=lora"], 1, ("llama", "self_attn.q_proj.base_layer")),
        (["method=upcycling"], 1, ("llama", "mlp")),
        (["method=sft"], 2, ("num_key_value_heads=1", "2 processes")),
    ],
)
def test_what_has_no_slices_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, settings: list[str], processes: int, named: tuple[str, ...]
) -> None:
    run: Any = compose([*world.overrides, *settings], world.conf)
    model = run.method.build(run, Material(backbone=lambda: load_model(run.backbone)))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with refused("train.parallelism.strategy=tp", *named):
        TensorParallel(model)


def test_a_family_without_a_plan_and_one_process_are_refused(world: World) -> None:
    with refused("train.parallelism.strategy=tp", "gpt2", "fsdp"):
        TensorParallel(make_model("gpt2"))
    run: Any = compose([*world.overrides, "method=sft", "train.parallelism.strategy=tp"], world.conf)
    with refused("train.parallelism.strategy=tp", "`mode launch --nproc 2"):
        choose_layout(make_model("llama"), run.train, torch.device("cpu"), anchored=False)


@pytest.mark.slow
def test_runs_in_slices_are_those_of_one_process(shared_world: World, tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    both, alone = (shared_world.at(tmp_path / name) for name in ("both", "alone"))
    place = tmp_path / "heads"  # as the world's backbone, with a key for every head
    shutil.copytree(Path(shared_world.conf).parent / "pico", place)
    LlamaForCausalLM(AutoConfig.from_pretrained(place, num_key_value_heads=2)).save_pretrained(place)
    more = [
        f"backbone.path={place}",
        "backbone.name=heads",
        "train.steps=6",
        "train.log_every=1",
        "train.batch.gradient_accumulation_steps=2",
    ]
    methods = (
        ["method=sft", "train.memory.activation_checkpointing=all"],
        ["method=mode", "method.start=fresh", "method.num_experts=1", "train.precision=bf16"],
        ["method=mode-anchored", "method.start=fresh", "method.anchor.source=prose", "method.num_experts=1"],
    )
    asked = [[*both.overrides, *more, *each, "train.parallelism.strategy=tp"] for each in methods]
    together(2, STOPPED, json.dumps(asked[0]), str(both.conf), "4")  # goes on in the next
    together(2, SCRIPT, json.dumps(asked), str(both.conf))
    for given, each in zip(asked, methods, strict=True):
        found = execute(compose(given, both.conf))
        expected = execute(compose([*alone.overrides, *more, *each], alone.conf))
        assert found.provenance["layout"] == {"kind": "tp", "processes": 2}
        close = 2e-2 if "train.precision=bf16" in each else 1e-4
        losses = [[point["loss"] for point in record.happened["curve"]] for record in (found, expected)]
        assert len(losses[0]) == 6
        assert losses[0] == pytest.approx(losses[1], rel=close)
        for domain, score in expected.happened["scores"].items():
            assert found.happened["scores"][domain]["loss"] == pytest.approx(score["loss"], rel=close)
