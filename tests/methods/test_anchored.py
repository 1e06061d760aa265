"""Anchored rows: the divergence from the backbone, on rows sampled from the backbone or taken from a domain."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from mode.backbone.load import load_model
from mode.config import identity
from mode.config.compose import compose as compose_run
from mode.config.method import Anchor, GateSettings
from mode.config.run import Run
from mode.core.files import remove
from mode.data.batches import Batches, Stream
from mode.methods.anchored import Adaptation
from mode.modular.block import find_blocks
from mode.modular.model import make_modular
from mode.ops.loss import CHUNK, compute_divergence, compute_hidden_states, compute_next_token_loss, find_head
from mode.runs.execute import execute
from mode.runs.forecast import forecast
from mode.runs.prepare import prepare_run
from mode.train import anchor_rows
from mode.train.anchor_rows import load_or_sample_rows, sample_rows
from mode.train.loop import forward_backward
from mode.train.objective import AnchorTerm, Objective
from mode.train.step_batch import StepBatch
from tests.conftest import World
from tests.support.refusals import refused

IDS = torch.tensor([[5, 17, 200, 3, 88, 41, 9, 120, 64], [7, 7, 30, 256, 1, 90, 12, 13, 250]])
SELF = ("method.anchor.source=self", "method.anchor.rows=8", "method.anchor.share=0.5")
METHODS = {
    "sft": ("method=sft",),
    "lora": ("method=lora",),
    "mode": ("method=mode", "method.start=fresh", "method.gate.reads=output", "method.gate.norm=true"),
}


def compose(world: World, *overrides: str) -> Run:
    return compose_run([*world.overrides, *overrides], world.conf)


def adaptation(run: Run) -> Any:
    assert isinstance(run.method, Adaptation)
    return run.method


def noisy(model: Any) -> Any:
    """Move everything that trains, so that the model is not its backbone any more."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


# --- the divergence


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("tokens", [7, CHUNK + 3])
def test_a_divergence_is_that_of_whole_distributions(cap: float | None, tokens: int) -> None:
    torch.manual_seed(0)
    states, known = torch.randn(1, tokens, 6, requires_grad=True), torch.randn(1, tokens, 5, requires_grad=True)
    weight, known_weight = torch.randn(11, 6, requires_grad=True), torch.randn(11, 5, requires_grad=True)

    def bounded(logits: torch.Tensor) -> torch.Tensor:
        return logits if cap is None else cap * torch.tanh(logits / cap)

    chances = bounded(known @ known_weight.T).softmax(-1).detach()
    model = bounded(states @ weight.T).log_softmax(-1)
    expected = (chances * (chances.log() - model)).sum(-1).mean()
    wanted = torch.autograd.grad(expected, (states, weight))
    found = compute_divergence(states, weight, known, known_weight, cap)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, right in zip(torch.autograd.grad(found, (states, weight)), wanted, strict=True):
        assert torch.allclose(mine, right, atol=1e-6)
    assert compute_divergence(known, known_weight, known, known_weight, cap).item() == pytest.approx(0.0, abs=1e-6)


# --- the loss


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("anchored", [[0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]])
def test_the_loss_is_the_mean_over_rows_of_cross_entropy_or_weighted_divergence(
    world: World, anchored: list[int], micro_batches: int
) -> None:
    run = compose(world, "method=sft", "train.batch.size=4", f"train.batch.gradient_accumulation_steps={micro_batches}")
    model, frozen = noisy(load_model(run.backbone).requires_grad_(True)), load_model(run.backbone)
    rows = torch.cat([IDS, IDS.flip(1)])
    mask = torch.tensor(anchored, dtype=torch.bool)
    term = AnchorTerm(
        3.0, lambda step: mask.numpy(), lambda _, ids: (compute_hidden_states(frozen, ids), find_head(frozen))
    )
    loss, _ = forward_backward(Objective(model, run.train, term), StepBatch(rows, mask), micro_batches)
    expected = torch.zeros(())
    for row, is_anchored in zip(rows, anchored, strict=True):
        logits, known = model(row[None, :-1]).logits[0], frozen(row[None, :-1]).logits[0].softmax(-1).detach()
        if is_anchored:
            expected = expected + 3.0 * (known * (known.log() - logits.log_softmax(-1))).sum(-1).mean() / 4
        else:
            expected = expected + functional.cross_entropy(logits, row[1:]) / 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-6), name


# --- the backbone's predictions


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_reference_is_the_backbone_whatever_was_trained(world: World, name: str) -> None:
    run = compose(world, *METHODS[name])
    method, bare = adaptation(run), load_model(run.backbone).eval()
    from mode.methods.base import Material

    model = method.build(run, Material(backbone=lambda: load_model(run.backbone)))
    reference = method.reference(lambda: load_model(run.backbone), torch.device("cpu"))
    noisy(model)
    states, weight = reference(model, IDS)
    assert not states.requires_grad
    assert torch.equal(states @ weight.T, bare(IDS).logits)
    assert not torch.allclose(model(IDS).logits, bare(IDS).logits)
    loss = compute_next_token_loss(compute_hidden_states(model, IDS[:, :-1]), find_head(model), IDS[:, 1:])
    loss.backward()  # experts are back in their places
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


# --- where the gate reads


def test_a_gate_reads_what_the_backbone_makes_of_its_block(world: World) -> None:
    run = compose(world)
    gates = GateSettings(reads="output", norm=True)
    model: Any = make_modular(load_model(run.backbone), experts=["a"], num_blocks=3, expert_layers=1, gate=gates)
    noisy(model).eval()
    read: list[torch.Tensor] = []
    made: list[torch.Tensor] = []
    for block in find_blocks(model):
        block.gate.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        block.backbone[-1].register_forward_hook(lambda module, args, output: made.append(output))
    model(IDS)
    assert len(read) == len(made) == 3
    assert all(torch.equal(one, other) for one, other in zip(read, made, strict=True))


@pytest.mark.slow
def test_experts_whose_gates_read_something_else_are_refused(world: World) -> None:
    stage = execute(compose(world, "targets=[py]", "method.start=fresh", "method.num_experts=1"), weights=True)
    folder = world.root / "runs" / stage.id / "expert"
    composed = compose(world, f"method.experts=[{folder}]", "method.gate.reads=output")
    with refused("method.gate.reads=input", "gate.reads=output"):
        prepare_run(composed)


# --- the rows


def test_rows_are_sampled_from_the_backbone(world: World) -> None:
    run = compose(world)
    model = load_model(run.backbone).eval()
    anchor = Anchor(source="self", rows=70, temperature=0.7)
    stream = sample_rows(model, anchor, 12, 0)
    assert np.array_equal(stream, sample_rows(model, anchor, 12, 0))
    rows = torch.from_numpy(stream.reshape(70, 12).astype(np.int64))
    assert (rows[:, 0] == 0).all()
    # The chance of what was sampled is what a model gives to its own samples: minus the entropy, within its spread.
    known = (model(rows[:, :-1]).logits.detach() / 0.7).log_softmax(-1)
    logs = known.gather(-1, rows[:, 1:, None])[..., 0]
    entropy = -(known.exp() * known).sum(-1)
    spread = float((logs + entropy).std()) / logs.numel() ** 0.5
    assert abs(float((logs + entropy).mean())) < 4 * spread
    firsts = sample_rows(model, Anchor(source="self", rows=70, prompt="token"), 3, 0).reshape(70, 3)[:, 0]
    assert len(set(firsts.tolist())) > 30


@pytest.mark.parametrize("prompt", ["document", "token"])
def test_sampled_rows_and_their_documents_begin_as_the_backbones_do(world: World, prompt: Any) -> None:
    model, bos, eos = load_model(compose(world).backbone).eval(), 5, 7
    head = model.get_output_embeddings()
    head.weight.data[eos] = head.weight.data.mean(0)  # every document ends after a while
    anchor = Anchor(source="self", rows=70, prompt=prompt, temperature=5.0)
    rows = sample_rows(model, anchor, 40, eos, bos).reshape(70, 40)
    assert (rows[:, 0] == bos).all()
    assert len(set(rows[:, 1].tolist())) > 20
    ended = rows[:, :-1] == eos
    assert ended.sum() > 3
    assert (rows[:, 1:][ended] == bos).all()


def test_rows_are_sampled_once_for_each_way_to_sample(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, device = compose(world), torch.device("cpu")
    anchor = Anchor(source="self", rows=4)
    first = load_or_sample_rows(anchor, run.backbone, "weights", 16, tmp_path, device)
    assert first.shape == (64,)
    with monkeypatch.context() as patch:
        patch.setattr(anchor_rows, "load_model", None)
        assert np.array_equal(load_or_sample_rows(anchor, run.backbone, "weights", 16, tmp_path, device), first)
    for other in (Anchor(source="self", rows=5), Anchor(source="self", rows=4, temperature=0.5)):
        load_or_sample_rows(other, run.backbone, "weights", 16, tmp_path, device)
    load_or_sample_rows(anchor, run.backbone, "others", 16, tmp_path, device)
    load_or_sample_rows(anchor, replace(run.backbone, bos=True), "weights", 16, tmp_path, device)
    assert len(list((tmp_path / "sampled").iterdir())) == 5


def test_damaged_sampled_rows_are_reported_and_sampled_again(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, anchor = compose(world), Anchor(source="self", rows=4)

    def load(fingerprint: str = "weights") -> Any:
        return load_or_sample_rows(anchor, run.backbone, fingerprint, 16, tmp_path, torch.device("cpu"))

    first = np.array(load())
    (folder,) = (tmp_path / "sampled").iterdir()
    (folder / "rows.bin").write_bytes(bytes(first.nbytes))
    assert np.array_equal(load(), first)
    assert "rows.bin" in capsys.readouterr().err
    # Rows of an earlier version are kept: they are one file without a digest.
    former = first[::-1].copy()
    remove(folder)
    np.save(folder.with_suffix(".npy"), former)
    assert np.array_equal(load(), former)
    assert np.array_equal(load(), former)
    assert [path.name for path in (tmp_path / "sampled").iterdir()] == [folder.name]
    # Once they are damaged, sampling gives other rows: nothing is replaced in silence.
    (folder / "rows.bin").write_bytes(b"")
    with refused(str(folder), "rows.bin", "remove the folder"):
        load()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("method.anchor.source=self",), {"py": 15, "sums": 15, "self": 2}),
        (("method.anchor.source=prose", "method.anchor.share=0.5"), {"py": 1, "sums": 1, "prose": 2}),
        (("method.anchor.source=self", "train.batch.replay={prose: 0.2}"), {"py": 6, "sums": 6, "prose": 3, "self": 1}),
        ((), {"py": 1, "sums": 1}),
    ],
)
def test_the_anchor_has_its_share_of_the_mix(
    world: World, overrides: tuple[str, ...], expected: dict[str, int]
) -> None:
    run = compose(world, "method=sft", *overrides)
    found = adaptation(run).mixture(run)
    total = Fraction(sum(found.values()))
    assert {name: count / total for name, count in found.items()} == {
        name: count / Fraction(sum(expected.values())) for name, count in expected.items()
    }


def test_every_batch_has_its_share_of_anchored_rows() -> None:
    streams = [
        Stream(name, np.arange(999, dtype=np.uint16), count) for name, count in (("a", 7), ("b", 7), ("self", 2))
    ]
    batches = Batches(streams, seed=0, batch_size=8, sequence_length=9)
    assert {batches.domains(step).count("self") for step in range(0, 20, 2)} == {2}
    assert sum(batches.domains(step).count("self") for step in range(20)) == 20


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("method.anchor.source=py",), ("method.anchor.source", "py", "targets=['py', 'sums']")),
        (("method.anchor.source=prose", "train.batch.replay={prose: 0.2}"), ("method.anchor.source", "prose")),
        (("method.anchor.source=porse",), ("domain porse", "prose?")),
        (("method.anchor.source=self", "method.anchor.share=0.123456"), ("method.anchor", "share", "100", "0.125")),
        (("method.anchor.source=self", "method.anchor.share=1.0"), ("method.anchor.share=1.0", "1")),
        (("method.anchor.source=self", "method.anchor.weight=0"), ("method.anchor.weight=0",)),
        (("method=backbone", "method.anchor.source=self"), ("method.anchor.source",)),
    ],
)
def test_an_anchor_that_cannot_be_is_refused(world: World, overrides: tuple[str, ...], named: tuple[str, ...]) -> None:
    with refused(*named):
        compose(world, *overrides)


def test_what_has_no_effect_makes_no_other_run(world: World) -> None:
    plain = identity.describe_run(compose(world, "method=sft"))
    assert (
        identity.describe_run(compose(world, "method=sft", "method.anchor.weight=9", "method.anchor.rows=3")) == plain
    )
    anchored = identity.describe_run(compose(world, "method=sft", "method.anchor.source=prose"))
    assert (
        identity.describe_run(compose(world, "method=sft", "method.anchor.source=prose", "method.anchor.rows=3"))
        == anchored
    )
    assert anchored != plain
    assert "anchor" not in plain["method"]


# --- runs


@pytest.mark.parametrize("experts", ["false", "true"])
def test_stage_one_is_anchored_where_it_is_asked_for(world: World, experts: str) -> None:
    run = compose(world, "method=mode", *SELF, f"method.anchor_experts={experts}")
    stages = adaptation(run).needs(run)
    assert {stage.method.anchor.source for stage in stages} == {"self" if experts == "true" else "none"}
    without = compose(world, "method=mode")
    same = [prepare_run(stage).id for stage in stages] == [
        prepare_run(stage).id for stage in adaptation(without).needs(without)
    ]
    assert same == (experts == "false")


def test_a_forecast_counts_what_the_backbone_says(world: World) -> None:
    plain, anchored = (forecast(compose(world, "method=sft", *more)) for more in ((), SELF))
    assert plain is not None
    assert anchored is not None
    share = (anchored.flops - plain.flops) / plain.flops
    assert 0.5 / 3.2 < share < 0.5 / 2.8  # a forward pass of half the rows, beside forward and backward passes


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_an_anchor_keeps_what_the_backbone_said(world: World, name: str) -> None:
    more = ("train.steps=30", "train.lr=1e-2", "train.log_every=30", "train.checkpoint_every=30")

    def apart(*overrides: str) -> float:
        from mode.runs.execute import restore

        run = compose(world, *METHODS[name], *more, *overrides)
        record = execute(run, weights=True)
        assert record.happened["forecast"]["flops"] == pytest.approx(record.happened["flops"], rel=0.01)
        model: Any = restore(prepare_run(run)).eval()
        bare = load_model(run.backbone).eval()
        ids = torch.from_numpy(np.asarray(prepare_run(run).packed["prose"].split("test").tokens[:256], np.int64))[None]
        with torch.no_grad():
            return float(
                compute_divergence(
                    compute_hidden_states(model, ids),
                    find_head(model),
                    compute_hidden_states(bare, ids),
                    find_head(bare),
                )
            )

    free = apart()
    assert apart("method.anchor.source=prose", "method.anchor.share=0.5", "method.anchor.weight=10") < 0.7 * free
    assert apart(*SELF, "method.anchor.weight=10") < free


@pytest.mark.slow
def test_an_interrupted_anchored_run_ends_bit_identical(world: World, tmp_path: Path) -> None:
    overrides = ("method=sft", *SELF, "train.log_every=1", "train.checkpoint_every=2")
    whole = execute(compose(world, *overrides))
    other = world.at(tmp_path / "other")

    def interrupt(prepared: Any, point: dict[str, Any]) -> None:
        if point["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(compose(other, *overrides), observe=interrupt)
    again = execute(compose(other, *overrides))
    assert again.id == whole.id
    assert again.happened["own_rows"] == whole.happened["own_rows"]
    assert again.happened["scores"] == whole.happened["scores"]
    assert [point["loss"] for point in again.happened["curve"]] == [point["loss"] for point in whole.happened["curve"]]
