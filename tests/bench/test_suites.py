"""The suites of `mode bench`: what is timed does what it says, and the same as what it is compared with."""

from __future__ import annotations

from contextlib import suppress
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mode.backbone.load import fingerprint_weights, load_model, locate
from mode.bench.records import COLLECTION, FIGURES, render_section
from mode.bench.suites.data import prepare_data
from mode.bench.suites.evaluation import prepare_evaluation
from mode.bench.suites.inference import prepare_generation
from mode.bench.suites.loops import EnoughError, OwnLoop, Rows, supports_bf16
from mode.bench.suites.loss import compute_full_logits_loss, compute_fused_loss, prepare_losses
from mode.bench.suites.options import prepare_branches, prepare_options
from mode.bench.suites.scale import prepare_scale
from mode.bench.suites.setup import STEPS, Bench, load_method
from mode.bench.suites.sharding import list_variants
from mode.bench.suites.startup import make_command_action, make_first_step, make_script_action
from mode.bench.suites.step import Step, prepare_steps
from mode.bench.suites.trainers import Kernels, OtherLoop
from mode.config.backbone import Backbone, RandomWeights
from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.config.method import Anchor
from mode.config.run import Run
from mode.core.device import measure_allocated
from mode.core.tensors import list_trainable
from mode.evaluation.likelihood import Text, compute_log_likelihoods, pack_texts
from mode.ops.loss import compute_next_token_loss
from tests.bench.test_records import fresh
from tests.cli.test_cli import call
from tests.conftest import World
from tests.support.refusals import refused

CPU = torch.device("cpu")
SPREAD = ("copies", "in shards", "side by side", "side by side, two in flight")
needs_peers = pytest.mark.skipif(not (find_spec("trl") and find_spec("accelerate")), reason="needs the extra `peers`")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def run_of(world: World, *overrides: str) -> Any:
    return compose([*world.overrides, "method=mode", *overrides], world.conf)


def random_backbone(folder: Path, seed: int = 0, **changes: Any) -> Backbone:
    weights = RandomWeights(config={**LLAMA, **changes}, seed=seed, cache=str(folder))
    return Backbone(name="random", path="random", random=weights)


def test_allocated_memory_is_exact() -> None:
    def action() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        torch.cat([second, second])

    assert measure_allocated(action, CPU) == 4 * 3000
    assert measure_allocated(lambda: None, CPU) == 0


def test_what_the_profiler_says_does_not_reach_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    measure_allocated(lambda: torch.ones(3), CPU)
    assert capfd.readouterr().err == ""


def test_random_weights_follow_from_shape_and_seed(tmp_path: Path) -> None:
    one, again = random_backbone(tmp_path / "a"), random_backbone(tmp_path / "b")
    other = random_backbone(tmp_path / "a", seed=1)
    assert fingerprint_weights(one) == fingerprint_weights(again) != fingerprint_weights(other)
    assert load_model(one).config.num_hidden_layers == 4
    assert hash(one) != hash(other)
    with refused("backbone.random.config"):
        load_model(random_backbone(tmp_path, model_type="no-model"))


def test_damaged_random_weights_are_reported_and_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = locate(random_backbone(tmp_path))
    before = fingerprint_weights(random_backbone(tmp_path))
    (folder / "digests.json").unlink()  # as an earlier version wrote it
    assert fingerprint_weights(random_backbone(tmp_path)) == before
    assert capsys.readouterr().err == ""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint_weights(random_backbone(tmp_path)) == before
    assert path.name in capsys.readouterr().err
    path.write_bytes(content)
    (folder / "digests.json").unlink()
    (folder / "config.json").unlink()
    assert fingerprint_weights(random_backbone(tmp_path)) == before
    assert str(folder) in capsys.readouterr().err


@pytest.mark.slow
def test_random_weights_have_no_tokenizer_and_say_so_in_one_line(world: World) -> None:
    result = call(world, "train", "expert", "--domain", "py", "backbone=llama-14m")
    assert result.exit_code == 2
    assert "no tokenizer" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("trains", [False, True])
def test_all_forms_of_the_loss_are_the_same(trains: bool) -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(96, 16, requires_grad=True), torch.randn(300, 16).requires_grad_(trains)
    targets = torch.randint(300, (96,))

    def results(form: Any) -> list[torch.Tensor]:
        states.grad = weight.grad = None
        loss = form()
        loss.backward()
        return [loss.detach(), states.grad, *([weight.grad] if trains else [])]  # type: ignore[list-item]

    expected = results(lambda: compute_full_logits_loss(states, weight, targets))
    for form in (
        lambda: compute_fused_loss(states, weight, targets, chunk=None),
        lambda: compute_fused_loss(states, weight, targets, chunk=32),
        lambda: compute_next_token_loss(states[None], weight, targets[None]),
    ):
        for ours, theirs in zip(results(form), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trains", [False, True])
def test_the_loss_takes_an_eighth_of_the_memory_of_full_logits_at_most(trains: bool) -> None:
    states, weight = torch.randn(2048, 64, requires_grad=True), torch.randn(8192, 64).requires_grad_(trains)
    targets = torch.randint(8192, (2048,))
    forms = (
        lambda: compute_full_logits_loss(states, weight, targets),
        lambda: compute_next_token_loss(states[None], weight, targets[None]),
    )
    most, least = (measure_allocated(lambda form=form: torch.autograd.backward(form()), CPU) for form in forms)
    assert least <= 0.12 * most


@pytest.mark.parametrize("experts", [(), ("one", "two")])
def test_packed_texts_are_blind_to_each_other(world: World, experts: tuple[str, ...]) -> None:
    run = run_of(world)
    model: Any = fresh(world, *experts) if experts else load_model(run.backbone).eval()
    random = np.random.default_rng(0)
    texts = [
        Text(random.integers(200, size=size).tolist(), given) for size, given in ((9, 1), (30, 4), (2, 1), (17, 9))
    ]
    alone = [compute_log_likelihoods(model, [text], row=1, batch_size=1)[0] for text in texts]
    together = compute_log_likelihoods(model, texts, row=32, batch_size=2)
    plain = [model(torch.tensor([text.tokens])).logits.detach().log_softmax(-1)[0] for text in texts]
    for text, logits, one, found in zip(texts, plain, alone, together, strict=True):
        ends = range(text.given, len(text.tokens))
        total = sum(logits[place - 1, text.tokens[place]].item() for place in ends)
        assert one.total == pytest.approx(total, rel=1e-5)
        assert found.total == pytest.approx(total, rel=1e-5)
        assert found.greedy == all(int(logits[place - 1].argmax()) == text.tokens[place] for place in ends)


def test_texts_are_packed_into_few_rows() -> None:
    rows = pack_texts([5, 12, 3, 40, 7], 16)
    assert sorted(index for row in rows for index in row) == [0, 1, 2, 3, 4]
    assert len(rows) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "suite", [prepare_data, prepare_branches, prepare_generation, prepare_losses, prepare_options, prepare_scale]
)
def test_suites_do_what_they_time(world: World, suite: Any) -> None:
    run = run_of(world)
    folder = world.root / "suite"
    folder.mkdir()
    cases, sizes = suite(run, run.method, CPU, folder)
    assert all(size > 0 for size in sizes.values())
    assert len({(case.job, case.variant) for case in cases}) == len(cases)
    for case in cases:
        if "compiled" not in case.variant:  # compiling takes a minute
            case.action()


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("lm_eval"), reason="needs lm-evaluation-harness")
def test_the_eval_suite_leaves_its_peers_and_limits_in_the_record(world: World) -> None:
    run = run_of(world)
    cases, _ = prepare_evaluation(run, run.method, CPU, world.root)  # it asserts that both come to the same sum
    assert [case.variant for case in cases] == 2 * ["lm-evaluation-harness", "mode"]
    result = call(world, "bench", "eval", "--rounds", "1")
    assert result.exit_code == 0, result.output
    (benchmark,) = COLLECTION.read(world.root / "results")
    assert render_section(benchmark) in result.stdout
    assert "| machine | copy |" in result.stdout
    theirs, ours = benchmark.happened["cases"][:2]
    assert ours["flops"] == theirs["flops"]
    assert ours["peak"] < theirs["peak"]


def test_what_liger_exchanges_is_there_for_its_trainer_alone(tmp_path: Path) -> None:
    from transformers.models.llama import modeling_llama as llama

    kernels, own = Kernels(load_model(random_backbone(tmp_path))), llama.apply_rotary_pos_emb
    for _ in range(2):
        with suppress(RuntimeError), kernels:
            first = llama.apply_rotary_pos_emb
            llama.apply_rotary_pos_emb = max
            raise RuntimeError
        assert llama.apply_rotary_pos_emb is own
    assert first is max  # the second time it was there already


@pytest.mark.parametrize("first", [1, 3])
def test_the_clock_of_a_loop_runs_over_the_steps_to_time(
    world: World, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    rows, made = Rows(run_of(world), 50, first), []
    monkeypatch.setattr("mode.bench.suites.loops.time", SimpleNamespace(perf_counter=lambda: 10.0 ** len(made)))
    with suppress(EnoughError):
        for step in range(20):
            rows.batch(step)
            made.append(step)
    assert made == list(range(first + STEPS - 1))
    assert rows.seconds == 10.0 ** (first + STEPS - 1) - 10.0**first


@pytest.mark.slow
@needs_peers
def test_liger_stays_beneath_what_autocasts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def patch(model: Any, *_: Any, **__: Any) -> None:  # as Liger does: its forward pass in the place of the model's
        own = type(model).forward

        @wraps(own)
        def forward(*args: Any, **options: Any) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return own(*args, **options)

        model.forward = MethodType(forward, model)

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", patch)
    run: Run = run_of(world)
    loop = OtherLoop("Trainer", Bench(run, load_method("sft"), CPU, world.root, "bf16"), liger=True)
    for _ in range(2):
        loop()
    assert seen == 2 * STEPS * [True]


def test_loops_are_no_graphs_without_a_gpu(world: World) -> None:
    result = call(world, "bench", "loops", "train.kernels.cuda_graph=true")
    assert result.exit_code == 2
    assert "train.kernels.cuda_graph=true needs a CUDA device" in result.output


@pytest.mark.slow
def test_the_scale_suite_varies_what_a_step_grows_with_and_is_drawn(world: World) -> None:
    run = run_of(world)
    method = replace_settings(run.method, num_blocks=2)
    cases, _ = prepare_scale(replace_settings(run, backbone=random_backbone(world.root)), method, CPU, world.root)
    sizes = [case for case in cases if case.job == "vocabulary"]
    assert [case.variant for case in sizes] == [f"V = {number}" for number in (75, 150, 300, 600, 1200)]
    assert len({case.action.model.get_output_embeddings().weight.shape for case in sizes}) == len(sizes)  # type: ignore[attr-defined]
    one, two, three, *_ = (case.flops for case in sizes)
    assert three - two == pytest.approx(2 * (two - one))
    told = [{"job": each.job, "variant": each.variant, "flops": each.flops, "seconds": [each.flops]} for each in cases]
    figure = world.root / "scale.png"
    FIGURES["scale"](told, figure)
    assert figure.stat().st_size > 10_000


@pytest.mark.slow
def test_start_up_is_timed_from_outside(world: World) -> None:
    make_script_action("")()
    with refused("nothing'"):
        make_command_action(["nothing"])()
    with refused("nothing"):
        make_first_step(["nothing"], world.root)()


@pytest.mark.slow
def test_the_first_step_of_a_run_is_seen(world: World) -> None:
    settings = [each for each in world.overrides if not each.startswith("paths.")]
    words = ["train", "baseline", "sft", "train.log_every=1", "--conf", str(world.conf), *settings]
    assert 0 < make_first_step([*words, f"paths.cache={world.root}/cache"], world.root)() < 120


@pytest.mark.slow
def test_the_sharding_suite_times_every_layout_beside_its_prediction(world: World) -> None:
    run: Run = run_of(world)
    jobs = list_variants(run, run.method)  # type: ignore[arg-type]
    assert list(jobs) == ["width 1, 1024 tokens", "width 1, 256 tokens", "width 1, 64 tokens"]
    assert {each.method.expert_layers for each in jobs.values()} == {1}  # type: ignore[attr-defined]
    result = call(world, "bench", "sharding", "--rounds", "1")
    assert result.exit_code == 0, result.output
    for job in jobs:
        for layout in ("one process", *(f"{name}{planned}" for name in SPREAD for planned in ("", ", planned"))):
            assert f"| {job} | {layout} |" in result.stdout
    assert call(world, "report", "bench").exit_code == 0
    (figure,) = (world.root / "results").glob("bench-sharding-pico-*.png")
    assert figure.stat().st_size > 10_000


@pytest.mark.slow
@needs_peers
def test_the_step_suite_makes_real_steps_of_every_method(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling takes a minute; that compiled layers train as plain ones is another test's.
    monkeypatch.setattr("mode.bench.suites.loops.OwnLoop", lambda at, compiled=False: OwnLoop(at))
    run: Run = run_of(world, "train.batch.size=8")
    cases, sizes = prepare_steps(run, run.method, CPU, world.root)  # type: ignore[arg-type]
    assert list(sizes)[:3] == ["full fine-tuning", "LoRA", "MoDE, one expert"]
    assert sizes["LoRA"] < sizes["MoDE, one expert"] < sizes["MoDE, two experts"]
    assert len({(case.job, case.variant) for case in cases}) == len(cases)
    loops = [case for case in cases if "loops" in case.job]
    half = {"mode, bf16", "mode, bf16, compiled layers"} if supports_bf16(CPU) else set()
    assert {case.variant for case in loops} == {"Trainer", "SFTTrainer", "mode", "mode, compiled layers"} | half
    plain = [case for case in loops if "fp32" in case.job and "compiled" not in case.variant]
    assert all(case.action() > 0 for case in plain)  # type: ignore[operator]
    for case in [case for case in cases if case not in loops]:
        step: Any = case.action
        before = {name: value.clone() for name, value in list_trainable(step.model).items()}
        step()
        assert any(not torch.equal(value, before[name]) for name, value in list_trainable(step.model).items())
        anchored = step.batch.anchored
        assert (0 if anchored is None else anchored.sum()) == (case.variant == "held")
    result = call(world, "bench", "step", "--rounds", "1")
    assert result.exit_code == 0, result.output
    assert "| anchor, LoRA | held |" in result.stdout
    assert "2 rows of 32 tokens" in result.stdout


def test_copies_in_bf16_are_in_a_steps_memory(world: World) -> None:
    def resident(precision: str) -> int:
        asked = ["method=mode", "method.start=fresh", "method.num_experts=1", f"train.precision={precision}"]
        run: Any = compose([*world.overrides, *asked], world.conf)
        return Step(run, run.method, Anchor(), torch.device("cpu")).resident()

    run: Any = compose([*world.overrides, "method=sft"], world.conf)
    maps = {name: each for name, each in load_model(run.backbone).named_parameters() if name.endswith("_proj.weight")}
    assert resident("bf16") - resident("fp32") == sum(2 * each.numel() for each in maps.values()) > 0
