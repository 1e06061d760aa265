"""What training costs: the closed forms against torch's counter and against built models, and budgets made of them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mode.backbone.load import load_model
from mode.backbone.shape import Flops, read_shape
from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.config.run import Run
from mode.launch.table_runs import forecast_table, list_stages
from mode.methods.base import Material, Method
from mode.moe.feed_forward import LowRankFeedForward
from mode.moe.low_rank import LowRankBank
from mode.ops.loss import compute_hidden_states
from mode.records.record import Record
from mode.runs.execute import execute
from mode.runs.forecast import count_attention, count_step_flops, forecast
from mode.runs.prepare import prepare_run
from tests.cli.test_cli import call
from tests.conftest import World
from tests.support.families import FAMILIES, make_model
from tests.support.refusals import refused

DRAWN = ("method.router.top_k=null", "method.router.renormalize=true", "method.router.sample=true")
FRESH = ("method=mode", "method.start=fresh")
METHODS: dict[str, tuple[str, ...]] = {
    "sft": ("method=sft",),
    "lora attention": ("method=lora",),
    "lora q and v": ("method=lora", "method.target_modules=[q_proj,v_proj]"),
    "lora k": ("method=lora", "method.target_modules=[k_proj]"),
    "lora o": ("method=lora", "method.target_modules=[o_proj]"),
    "lora feed-forward": ("method=lora", "method.target_modules=[gate_proj,up_proj,down_proj]"),
    "lora down": ("method=lora", "method.target_modules=[down_proj]"),
    **{f"mode {count}": (*FRESH, f"method.num_experts={count}") for count in (1, 2, 4)},
    "mode 2 and the head": (*FRESH, "method.head_rank=4"),
    "mode 2 and gates' hidden layer": (*FRESH, "method.gate.hidden=8", "method.head_rank=4"),
    "mode 2 blocks, 2 layers": (*FRESH, "method.num_blocks=2", "method.expert_layers=2"),
    "mode 3, one branch stays": (*FRESH, "method.num_experts=3", "method.gate.top_k=1"),
    "mode 3 of 2 layers, two stay": (
        *FRESH,
        "method.num_blocks=2",
        "method.num_experts=3",
        "method.expert_layers=2",
        "method.gate.top_k=2",
    ),
    "mode 3, one branch stays, read after": (
        *FRESH,
        "method.num_experts=3",
        "method.gate.top_k=1",
        "method.gate.reads=output",
    ),
    "mode 2, by their share": (*FRESH, "method.gate.top_p=0.4"),
    "molora": ("method=molora",),
    "molora q and v": ("method=molora", "method.target_modules=[q_proj,v_proj]"),
    "mov": ("method=mov",),
    "loramoe": ("method=loramoe",),
    "moelora": ("method=moelora", "train.sequence_length=256"),
    "moelora, guessed": ("method=moelora", "method.task=guessed", "train.sequence_length=256"),
    "mixlora": ("method=mixlora",),
    "upcycling": ("method=upcycling",),
    "upcycling, drawn": ("method=upcycling", *DRAWN),
    "upcycling, all experts": ("method=upcycling", "method.router.top_k=null", "method.router.renormalize=true"),
    "btm average": ("method=btm", "method.combine=average"),
    "backbone": ("method=backbone",),
    "flow": ("method=flow",),
    "stm": ("method=stm",),
    "rho-1": ("method=rho-1",),
}
QUICK = ("sft", "lora attention", "mode 2", "mixlora", "moelora")


def run_of(world: World, *overrides: str) -> Run:
    return compose([*world.overrides, *overrides], world.conf)


def built(run: Run) -> Any:
    assert isinstance(run.method, Method)
    return run.method.build(run, Material(backbone=lambda: load_model(run.backbone)))


def check(run: Run, model: Any) -> None:
    """Compare a closed form with what torch counts, and with the model's own parameters."""
    assert isinstance(run.method, Method)
    cost = run.method.cost(run)
    assert cost is not None
    model.train()
    found = count_step_flops(model, torch.zeros(2, run.train.sequence_length, dtype=torch.long), nullcontext())
    assert found.forward == pytest.approx(cost.flops.forward, rel=0.01)
    assert found.backward == pytest.approx(cost.flops.backward, rel=0.01)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert cost.total == sum(sizes)
    assert cost.trainable == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert cost.added == cost.total - read_shape(run.backbone).parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_closed_forms_agree_with_torchs_counter_and_the_models_parameters(world: World, name: str) -> None:
    run = run_of(world, *METHODS[name])
    check(run, built(run))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mode 2", "lora attention"])
def test_the_count_is_that_of_torchs_own_counter(world: World, name: str) -> None:
    run = run_of(world, *METHODS[name])
    model, rows = built(run).train(), torch.zeros(2, 16, dtype=torch.long)
    with FlopCounterMode(display=False, custom_mapping=count_attention()) as theirs:
        states = compute_hidden_states(model, rows)
        states.backward(torch.ones_like(states))
    weight = model.get_output_embeddings().weight
    heads = 2.0 * weight.numel() * (2 + weight.requires_grad)
    found = count_step_flops(model, rows, nullcontext())
    assert found.total == theirs.get_total_flops() / rows.numel() + heads


@pytest.mark.slow
def test_an_ensemble_takes_what_its_members_take(world: World) -> None:
    alone, together = (
        run_of(world, text).method.cost(run_of(world, text)) for text in ("method=backbone", "method=btm")
    )
    assert together.flops == Flops(3 * alone.flops.forward)  # the backbone and two branches
    assert (together.total, together.added, together.trainable) == (3 * alone.total, 2 * alone.total, 0)


def test_gates_alone_take_less_than_experts_beside_them(world: World) -> None:
    run = run_of(world, *FRESH)
    model = built(run)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.requires_grad_(False)
    check(run_of(world, "method=mode", "method.train_experts=false"), model)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["sft", "lora attention", "mode 2", "mode 3, one branch stays"])
def test_closed_forms_hold_on_every_family(world: World, tmp_path: Path, family: str, name: str) -> None:
    make_model(family).save_pretrained(tmp_path / family)
    run = run_of(world, *METHODS[name], f"backbone.path={tmp_path / family}", "train.sequence_length=16")
    check(run, built(run))


def test_the_count_leaves_the_model_as_it_was(world: World) -> None:
    model = built(run_of(world, "method=sft"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_step_flops(model, torch.zeros(1, 8, dtype=torch.long), nullcontext())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_chosen_branches_are_active(world: World) -> None:
    dense, sparse = (run_of(world, *FRESH, "method.num_blocks=3", f"method.gate.top_k={k}") for k in ("null", "1"))
    assert isinstance(dense.method, Method)
    one, other = dense.method.cost(dense), sparse.method.cost(sparse)  # type: ignore[attr-defined]
    assert one is not None
    assert one.active == one.total
    layer = read_shape(dense.backbone).layers[0].parameters
    # Of every block's backbone (two layers) and two experts (one layer each), the backbone is the largest.
    assert one.active - other.active == 3 * 2 * layer


ROWS = {
    "sft": ("method=sft",),
    "lora": ("method=lora",),
    "mode": ("method=mode",),
    "frozen": ("method=mode", "method.train_experts=false"),
}


@pytest.mark.parametrize("name", ROWS)
def test_equal_operations_are_what_full_fine_tuning_takes(world: World, name: str) -> None:
    given = ("train.steps=200", "budget=compute")
    whole = forecast(run_of(world, "method=sft", "train.steps=200"))
    stages = [forecast(run) for run in list_stages(run_of(world, *ROWS[name], *given))]
    assert whole is not None
    assert sum(stage.flops for stage in stages if stage) == pytest.approx(whole.flops, rel=0.01)


@pytest.mark.parametrize("policy", ["data", "params"])
@pytest.mark.parametrize("name", ROWS)
def test_equal_tokens_are_shared_by_the_stages(world: World, name: str, policy: str) -> None:
    stages = [forecast(run) for run in list_stages(run_of(world, *ROWS[name], "train.steps=31", f"budget={policy}"))]
    assert sum(stage.steps for stage in stages if stage) == 31


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "molora", "loramoe", "mixlora", "moelora"])
def test_equal_parameters_raise_the_rank_of_adapters(world: World, name: str) -> None:
    matched, plain = (run_of(world, f"method={name}", *more) for more in (["budget=params"], []))
    told = [forecast(run) for run in (matched, run_of(world, "method=mode", "budget=params"))]
    adapters, experts = (each.trainable for each in told if each)
    settings: Any = plain.method
    least = settings.least
    step = settings.adds(plain, 2 * least) - settings.adds(plain, least)
    assert abs(adapters - experts) <= step / 2
    model = built(matched)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == adapters
    scales = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
    scales |= {module.scale for module in model.modules() if isinstance(module, LowRankBank | LowRankFeedForward)}
    assert max(scales) == pytest.approx(min(scales)) == pytest.approx(settings.alpha / settings.rank)


@pytest.mark.slow
def test_equal_parameters_are_more_vectors_and_wider_experts_under_gates(world: World) -> None:
    wanted = forecast(run_of(world, "method=mode", "budget=params"))
    assert wanted is not None
    run = run_of(world, "method=mov", "budget=params")
    vectors = forecast(run)
    assert vectors is not None
    assert vectors.added == pytest.approx(wanted.added, rel=0.02)
    model = built(run)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == vectors.added

    run = run_of(world, "method=mole", "budget=params")
    method: Any = run.method
    gates = forecast(run)
    assert gates is not None
    assert gates.added == pytest.approx(wanted.added, rel=0.02)
    stages = method.needs(run)
    assert len({stage.method.rank for stage in stages}) == 1
    assert stages[0].method.rank > method.expert.rank
    assert stages[0].method.scale == pytest.approx(method.expert.scale)
    assert sum(told.added for stage in stages if (told := forecast(stage))) + gates.trainable == gates.added


def test_a_rank_stabilised_adapter_keeps_alpha_when_its_rank_is_raised(world: World) -> None:
    run = run_of(world, "method=lora", "method.rank_stabilized=true", "budget=params")
    settings: Any = run.method
    assert settings.sized(run).rank > settings.rank
    assert settings.sized(run).alpha == settings.alpha


def test_a_rank_that_changes_nothing_or_costs_nobody_knows_what_is_refused(world: World) -> None:
    for name, setting, message in (
        ("lora", "method.target_modules=[model.layers.0.mlp.up_proj]", "budget=params"),
        ("mixlora", "method.router={top_k: null, top_p: 0.5}", "MixLoRA"),
    ):
        with refused("budget=params", message):
            built(run_of(world, f"method={name}", setting, "budget=params"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["data", "params", "compute"])
def test_a_budget_that_changes_nothing_is_no_other_run(world: World, policy: str) -> None:
    for name in ("backbone", "sft"):
        one, same = (prepare_run(run_of(world, f"method={name}", f"budget={each}")).id for each in ("paper", policy))
        assert one == same
    one, same = (prepare_run(run_of(world, "method=mode", f"budget={each}")).id for each in ("paper", policy))
    assert one != same


def test_a_record_has_the_forecast_and_what_was_counted(world: World) -> None:
    record: Record = execute(run_of(world, "method=sft", "train.steps=3"))
    told = record.happened["forecast"]
    assert told["tokens"] == record.happened["tokens"]
    assert record.happened["flops"] == pytest.approx(told["flops"], rel=0.01)
    sizes = record.happened["parameters"]
    assert {name: told[name] for name in sizes} == sizes


@pytest.mark.slow
def test_a_record_has_the_bytes_to_keep_for_its_domain(world: World) -> None:
    sizes = {}
    for name, given in {"sft": (), "lora": (), "mode": ("method.start=fresh", "method.num_experts=1")}.items():
        run = run_of(world, f"method={name}", "targets=[py]", "train.steps=2", *given)
        record = execute(run)
        assert isinstance(run.method, Method)
        kept = run.method.kept(prepare_run(run).folder)
        sizes[name] = record.happened["kept_bytes"]
        assert sizes[name] == kept.stat().st_size
        assert sizes[name] == pytest.approx(4 * record.happened["parameters"]["trainable"], rel=0.5)  # and a header
        assert (kept.parent.name == "expert") is (name == "mode")
    assert sizes["lora"] < sizes["mode"]


@pytest.mark.slow
def test_a_method_that_does_not_say_what_it_takes_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(world, "method=sft", "budget=compute")
    monkeypatch.setattr(type(run.method), "cost", Method.cost)
    with refused("budget=compute", "SFT", "`cost`"):
        execute(run)
    assert (
        execute(replace_settings(run, budget=replace_settings(run.budget, policy="data"))).happened["forecast"] is None
    )
    assert forecast_table("table1", world.overrides, world.conf)["SFT"] is None


@pytest.mark.slow
def test_the_forecast_of_a_table_is_printed(world: World) -> None:
    result = call(world, "show", "budget", "table1", "train.steps=60")
    assert result.exit_code == 0, result.output
    assert "TFLOPs" in result.stdout
    assert call(world, "show", "budget", "tabel1").exit_code == 2
