"""Divergence of a model's predictions from its backbone's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mode.backbone.load import load_model
from mode.config.compose import compose
from mode.data.pack import PackedSplit
from mode.evaluation.divergence import measure_divergence
from mode.runs.execute import execute, restore
from mode.runs.fit import measure_divergences
from mode.runs.prepare import prepare_run
from tests.conftest import World


def make_split(tokens: int, bos: int | None = None) -> PackedSplit:
    stream = np.random.default_rng(0).integers(5, 300, tokens)
    return PackedSplit(stream, np.array([0, tokens]), tokens, bos)


@pytest.mark.parametrize(("tokens", "row", "bos"), [(70, 8, None), (70, 8, 3), (6, 8, None), (130, 4, None)])
def test_it_is_the_mean_of_the_full_sum_over_the_vocabulary(
    world: World, tokens: int, row: int, bos: int | None
) -> None:
    backbone = load_model(compose(world.overrides, world.conf).backbone).eval()
    model = load_model(compose(world.overrides, world.conf).backbone).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    split = make_split(tokens, bos)
    length = min(row, tokens - 1)
    rows = [split.tokens[start : start + length] for start in range(0, tokens - length, length)][: 101 // length]
    found = []
    with torch.no_grad():
        for each in rows:
            inputs = torch.tensor(each)[None]
            if bos is not None:
                inputs[:, 0] = bos
            known, ours = (m(input_ids=inputs).logits.double().softmax(-1) for m in (backbone, model))
            found.append(float((known * (known / ours).log()).sum(-1).mean()))
    measured = measure_divergence(model, backbone, split, sequence_length=row, chunk=3, tokens=101)
    assert measured == pytest.approx(np.mean(found), rel=1e-4)
    assert measured > 0.01
    assert measure_divergence(backbone, backbone, split, sequence_length=row, chunk=3) == 0.0


@pytest.mark.parametrize("method", ["backbone", "sft", "mode", "btm", "lora"])
def test_a_record_has_it_for_every_target(world: World, method: str) -> None:
    rate = [] if method in ("backbone", "btm") else ["method.lr=0.05"]
    run = compose([*world.overrides, f"method={method}", *rate], world.conf)
    record = execute(run, weights=True)
    assert list(record.outcome.divergence) == ["py", "sums"]
    if method == "backbone":
        assert record.outcome.divergence == {"py": 0.0, "sums": 0.0}
    else:
        assert all(value > 0 for value in record.outcome.divergence.values())
    prepared = prepare_run(run)
    assert measure_divergences(prepared, restore(prepared)) == pytest.approx(record.outcome.divergence, rel=1e-3)


def test_several_processes_do_not_measure_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare_run(compose([*world.overrides, "method=backbone"], world.conf))
    monkeypatch.setattr("mode.core.processes.world_size", lambda: 2)
    assert measure_divergences(prepared, load_model(prepared.run.backbone)) == {}
