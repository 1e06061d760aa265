"""The loop: golden losses, determinism, resuming, accumulation, schedule, and its one-line refusals."""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from mode.backbone.load import load_model
from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.core.files import list_checkpoints
from mode.core.locks import lock_folder
from mode.core.tensors import digest_tensors, list_trainable, load_tensors
from mode.ops.loss import compute_hidden_states
from mode.records.provenance import read_processor_name
from mode.records.record import Record
from mode.runs.execute import WEIGHTS, execute
from mode.runs.prepare import Prepared, prepare_run
from mode.train.checkpoint import Saver, find_tensors, load_checkpoint, read_counters
from tests.conftest import World
from tests.support.processes import start_command
from tests.support.refusals import refused

GOLDEN = Path(__file__).parent / "golden.json"
GOLDEN_SETTINGS = ("train.steps=20", "train.log_every=1", "train.checkpoint_every=20", "train.lr=1e-3")
MODE = ("method=mode", "method.start=fresh", "method.num_blocks=3", "method.backbone_bias=0")  # whatever the defaults
LOSSES = {"sft": ["method=sft"], "lora": ["method=lora"], "mode": [*MODE]}


class CrashError(Exception):
    """Stands for whatever may stop a process."""


def run_of(world: World, *overrides: str) -> Any:
    return compose([*world.overrides, *overrides], world.conf)


def weights_of(world: World, *overrides: str) -> dict[str, torch.Tensor]:
    return load_tensors(prepare_run(run_of(world, *overrides)).folder / WEIGHTS)[0]


def curve_of(record: Record) -> list[dict[str, Any]]:
    return [{key: value for key, value in point.items() if key != "seconds"} for point in record.happened["curve"]]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_golden(world: World, name: str) -> None:
    record = execute(run_of(world, *LOSSES[name], *GOLDEN_SETTINGS))
    losses = [point["loss"] for point in record.happened["curve"]]
    golden = json.loads(GOLDEN.read_text())
    same_conditions = golden["conditions"] == [read_processor_name(), torch.__version__]
    expected = [float.fromhex(value) for value in golden[name]]
    # Full precision where the golden values were made; other processors and versions may sum in another order.
    assert losses == (expected if same_conditions else pytest.approx(expected, rel=1e-4))


@pytest.mark.slow
def test_same_configuration_gives_the_same_bits(world: World, shared_world: World, tmp_path: Path) -> None:
    other = shared_world.at(tmp_path / "other")
    first, second = (execute(run_of(each, "method=sft")) for each in (world, other))
    assert curve_of(first) == curve_of(second)
    assert first.happened["scores"] == second.happened["scores"]
    left, right = weights_of(world, "method=sft"), weights_of(other, "method=sft")
    assert left.keys() == right.keys() != set()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("method", "stop"),
    [
        ("sft", 4),
        *[pytest.param("sft", stop, marks=pytest.mark.slow) for stop in (2, 6)],
        *[pytest.param(method, stop, marks=pytest.mark.slow) for method in ("mode", "lora") for stop in (2, 4, 6)],
        pytest.param("upcycling", 6, marks=pytest.mark.slow),
    ],
)
def test_interrupted_run_ends_bit_identical(
    world: World, shared_world: World, tmp_path: Path, method: str, stop: int
) -> None:
    overrides = (f"method={method}", "train.steps=8", "train.log_every=1", "train.checkpoint_every=4")
    if method == "mode":
        overrides = (*overrides, "method.start=fresh")
    if method == "upcycling":  # draws experts: what is random depends on seed and step alone
        router = ("method.router.top_k=null", "method.router.renormalize=true", "method.router.sample=true")
        overrides = (*overrides, *router)
    whole = shared_world.at(tmp_path / "whole")
    expected = execute(run_of(whole, *overrides))

    def crash(prepared: Prepared, point: dict[str, Any]) -> None:
        if point["step"] == stop:
            raise CrashError

    with pytest.raises(CrashError):
        execute(run_of(world, *overrides), observe=crash)
    resumed_from: list[int] = []
    resumed = execute(run_of(world, *overrides), observe=lambda prepared, point: resumed_from.append(point["step"]))
    assert resumed_from[0] == stop // 4 * 4 + 1
    assert curve_of(resumed) == curve_of(expected)
    left, right = weights_of(world, *overrides), weights_of(whole, *overrides)
    assert left.keys() == right.keys() != set()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_sigkill_at_any_moment_ends_bit_identical(world: World, shared_world: World, tmp_path: Path) -> None:
    settings = ["method=mode", "train.steps=32", "train.checkpoint_every=4", "train.batch.size=16"]
    whole = shared_world.at(tmp_path / "whole")
    expected = execute(run_of(whole, *settings))
    command = ["compose", *world.overrides, *settings[1:], "--conf", str(world.conf)]
    rng, kills = random.Random(1), 0
    runs = world.root / "runs"
    while kills < 3:
        process = start_command(*command)
        marks = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
        while process.is_alive():  # wait until it has got somewhere, then kill it at a random moment after
            if any(marks.get(path) != path.stat().st_mtime_ns for path in list(runs.rglob("curve.jsonl"))):
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.6))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert kills >= 1
    last = start_command(*command)
    last.join()
    assert last.exitcode == 0
    resumed = execute(run_of(world, *settings))
    assert curve_of(resumed) == curve_of(expected)
    assert resumed.happened["scores"] == expected.happened["scores"]
    left, right = weights_of(world, *settings), weights_of(whole, *settings)
    assert left.keys() == right.keys() != set()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_killed_before_its_record_stands_trains_no_step_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(world, "method=sft")

    def crash(*arguments: Any) -> None:
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr("mode.records.record.Record.write", crash)
        with pytest.raises(CrashError):
            execute(run)
    steps: list[int] = []
    record = execute(run, observe=lambda prepared, point: steps.append(point["step"]))
    assert steps == []
    assert [point["step"] for point in record.happened["curve"]] == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("left", ["checkpoint-4", ".checkpoint-4.elsewhere-1-2.partial"])
def test_a_run_killed_after_its_record_stands_leaves_no_checkpoint(
    world: World, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    run = run_of(world, "method=sft")
    with monkeypatch.context() as patch:
        patch.setattr("mode.runs.execute.remove", lambda *paths: None)
        execute(run)
    folder = prepare_run(run).folder
    assert (folder / "checkpoint-4").is_dir()
    (folder / "checkpoint-4").rename(folder / left)
    with lock_folder(folder):
        if left == "checkpoint-4":
            execute(run)  # another process may still remove it
            assert (folder / left).is_dir()
    execute(run)
    assert sorted(path.name for path in folder.iterdir()) == ["curve.jsonl", "lock", "run.yaml", "weights.safetensors"]


@pytest.mark.slow
def test_accumulation_changes_nothing_but_rounding(world: World, shared_world: World, tmp_path: Path) -> None:
    other = shared_world.at(tmp_path / "other")
    settings = ("method=sft", "train.batch.size=4")
    plain = execute(run_of(world, *settings))
    split = execute(run_of(other, *settings, "train.batch.gradient_accumulation_steps=2"))
    losses = [[point["loss"] for point in record.happened["curve"]] for record in (plain, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_checkpoint_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    layer = torch.nn.Linear(2, 2)
    with refused("checkpoint-1", "file"), Saver() as saver:
        saver.save(tmp_path / "file", list_trainable(layer), torch.optim.AdamW(layer.parameters()), 1, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_is_of_its_own_step_whatever_the_next_ones_do(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2048, 2048)
    before = layer.weight.detach().clone()
    with Saver() as saver, torch.no_grad():
        saver.save(tmp_path, list_trainable(layer), torch.optim.AdamW(layer.parameters()), 1, 0.125)
        layer.weight.zero_()
    (checkpoint,) = list_checkpoints(tmp_path)
    load_checkpoint(checkpoint, list_trainable(layer))
    assert torch.equal(layer.weight, before)
    assert read_counters(checkpoint) == (1, 0.125)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_told_in_one_line(world: World) -> None:
    run = run_of(world, "method=sft", "train.steps=4", "train.log_every=1", "train.checkpoint_every=1")

    def crash(prepared: Prepared, point: dict[str, Any]) -> None:
        if point["step"] == 2:
            raise CrashError

    with pytest.raises(CrashError):
        execute(run, observe=crash)
    (checkpoint,) = list_checkpoints(prepare_run(run).folder)
    (part,) = checkpoint.glob("*.safetensors")
    left = checkpoint.with_name(".checkpoint-9.partial")  # of processes that were killed as they wrote
    left.mkdir()
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    with refused(checkpoint.name):
        execute(run)
    part.write_bytes(whole)
    execute(run)
    assert not left.exists()


def test_a_checkpoint_without_one_of_its_files_is_not_gone_on_from(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY

    for start in (0, 1, 2):  # as three processes write a vector in shards
        offsets = {"parameter.bias": {"saved_offsets": [start]}, "counters": {"saved_offsets": [0]}}
        tensors = {"parameter.bias": torch.ones(1)} | ({"counters": torch.ones(2)} if start == 0 else {})
        told = {CUSTOM_METADATA_KEY: json.dumps({name: offsets[name] for name in tensors})}
        save_file(tensors, tmp_path / f"{start}.safetensors", metadata=told)
    assert set(find_tensors(tmp_path)) == {"parameter.bias", "counters"}
    (tmp_path / "1.safetensors").unlink()
    with refused("parameter.bias"):
        find_tensors(tmp_path)
    (tmp_path / "0.safetensors").unlink()
    (tmp_path / "2.safetensors").unlink()
    with refused("counters"):
        find_tensors(tmp_path)


def test_a_diverging_run_stops_with_the_step_and_the_learning_rate(world: World) -> None:
    with refused("nan", "train.lr", suggestion="1e+30"):
        execute(run_of(world, "method=sft", "train.lr=1e30", "train.steps=8"))


def test_finished_runs_keep_no_optimizer_state_and_only_what_trains(world: World) -> None:
    record = execute(run_of(world, "method=lora"))
    folder = prepare_run(run_of(world, "method=lora")).folder
    assert not list_checkpoints(folder)
    tensors, metadata = load_tensors(folder / WEIGHTS)
    assert metadata == {"run": record.id, "digest": digest_tensors(tensors)}
    assert all("lora_" in name for name in tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == record.happened["parameters"]["trainable"]


def test_two_processes_never_train_the_same_run(world: World) -> None:
    run = run_of(world, "method=sft")

    def intrude(prepared: Prepared, point: dict[str, Any]) -> None:
        execute(run)

    with refused(str(prepare_run(run).folder)):
        execute(run, observe=intrude)


def test_settings_of_the_loop_reach_the_record(world: World) -> None:
    run = run_of(world, "method=sft", "train.lr=2e-3")
    record = execute(run)
    assert record.happened["lr"] == 2e-3
    assert record.happened["tokens"] == 4 * 2 * 32
    assert record.asked["train"]["steps"] == asdict(run.train)["steps"] == 4


SPARSE = ("upcycling", "mixlora", "loramoe", "mole", "moelora")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "lora", "mode", *SPARSE])
def test_activations_formed_again_change_no_bit(world: World, method: str) -> None:
    settings = {"mode": ["method.start=fresh", "method.num_experts=1"]}.get(method, [])
    losses = {}
    for which in ("none", "frozen", "all"):
        here = world.at(world.root / which)
        run = compose(
            [
                *here.overrides,
                f"method={method}",
                *settings,
                "train.log_every=1",
                f"train.memory.activation_checkpointing={which}",
            ],
            world.conf,
        )
        record = execute(run)
        losses[which] = [point["loss"] for point in record.happened["curve"]]
    assert losses["none"] == losses["frozen"] == losses["all"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "mode", "mixlora"])
def test_frozen_weights_held_in_bf16_change_no_bit(world: World, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"mode": ["method.start=fresh", "method.num_experts=1"]}.get(method, [])
    records = []
    for place in ("held", "cast"):
        here = world.at(world.root / place)
        asked = [*here.overrides, f"method={method}", *settings, "train.log_every=1", "train.precision=bf16"]
        records.append(execute(compose(asked, world.conf)))
        monkeypatch.setattr("mode.train.step_options.find_frozen_matrices", lambda layers: [])
    held, cast = records
    assert len(curve_of(held)) == 4
    assert curve_of(held) == curve_of(cast)
    assert held.happened["scores"] == cast.happened["scores"]


def test_what_is_frozen_is_in_bf16_within_a_step_alone(world: World) -> None:
    from mode.backbone.structure import find_frozen_matrices
    from mode.train.step_options import StepOptions

    run = compose([*world.overrides, "method=sft"], world.conf)
    model = load_model(run.backbone).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = StepOptions(model, run.train, half=True)
    with layers:
        kinds = {name: value.dtype for name, value in model.named_parameters()}
    halved = {name for name, kind in kinds.items() if kind == torch.bfloat16}
    assert halved == {name for name in kinds if name.endswith("_proj.weight")}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(halved) == len(layers.bf16_weights)
    assert not find_frozen_matrices(list(load_model(run.backbone).model.layers))


@pytest.mark.parametrize(
    ("asked", "tiles", "hidden", "expected"),
    [
        ("auto", True, 256, "bf16"),
        ("auto", True, 255, "fp32"),
        ("auto", False, 4096, "fp32"),
        ("fp32", True, 4096, "fp32"),
        ("bf16", False, 8, "bf16"),
    ],
)
def test_a_processor_trains_in_bf16_where_it_pays(
    asked: str, tiles: bool, hidden: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mode.train.precision import resolve_precision

    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": tiles, "avx512_bf16": True})
    assert resolve_precision(asked, torch.device("cpu"), hidden) == expected


@pytest.mark.slow
def test_where_bf16_pays_a_run_is_in_bf16_and_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True})
    plain = execute(run_of(world.at(world.root / "narrow"), "method=sft"))
    monkeypatch.setattr("mode.train.precision.WIDE", 1)
    auto, asked = (
        execute(run_of(world.at(world.root / place), "method=sft", f"train.precision={precision}"))
        for place, precision in (("wide", "auto"), ("half", "bf16"))
    )
    assert [each.provenance["precision"] for each in (plain, auto, asked)] == ["fp32", "bf16", "bf16"]
    assert curve_of(plain) != curve_of(auto) == curve_of(asked)


@pytest.mark.parametrize(
    ("setting", "flops", "expected"), [("auto", 1e13, False), ("auto", 3e13, True), (True, 1.0, True)]
)
def test_layers_are_compiled_where_a_stage_is_long(world: World, setting: Any, flops: float, expected: bool) -> None:
    from mode.train.step_options import should_compile

    settings = replace_settings(run_of(world, "method=sft").train, **{"kernels.compile": setting})
    assert should_compile(settings, torch.device("cpu"), flops) is expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_layers_of_many_kinds_are_all_compiled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from mode.train.step_options import StepOptions

    def quickly(layer: Any, **options: Any) -> None:
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", quickly)
    run = run_of(world, "method=sft")
    model = load_model(run.backbone).train()
    with (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
        StepOptions(model, replace_settings(run.train, **{"kernels.compile": True})),
    ):
        for size in range(1, 12):
            compute_hidden_states(model, torch.arange(12).expand(size, -1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_layers_train_as_plain_ones_and_are_plain_again_afterwards(world: World) -> None:
    from mode.backbone.structure import find_decoder_layers
    from mode.train.step_options import StepOptions

    run = compose([*world.overrides, "method=sft"], world.conf)
    ids = torch.arange(24).view(2, 12)
    model = load_model(run.backbone).train()
    layers = StepOptions(model, replace_settings(run.train, **{"kernels.compile": True}))
    plain = model(input_ids=ids).logits
    with layers:
        compiled = model(input_ids=ids).logits
        assert all(layer._compiled_call_impl is not None for layer in find_decoder_layers(model))
    assert all(layer._compiled_call_impl is None for layer in find_decoder_layers(model))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    slopes = []
    for logits in (plain, compiled):
        model.zero_grad()
        logits.square().mean().backward()
        slopes.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
