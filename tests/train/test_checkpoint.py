"""A damaged checkpoint or curve is never resumed from, and the message says how to continue."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mode.config.compose import compose
from mode.core.digests import INDEX
from mode.core.files import CURVE, list_checkpoints
from mode.core.tensors import list_trainable
from mode.runs.execute import execute
from mode.runs.prepare import prepare_run
from mode.train.checkpoint import COUNTERS, Saver, check_checkpoint, load_checkpoint, read_counters
from mode.train.curve import append_point
from mode.train.loop import TrainJob, resume
from tests.conftest import World
from tests.support.refusals import refused

STEP = 4


class CrashError(Exception):
    """Stands for whatever may stop a process."""


def write_checkpoint(folder: Path, step: int = STEP) -> tuple[nn.Module, Path]:
    """Write a curve and a checkpoint of a small layer with optimizer state; return both."""
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    for each in range(1, step + 1):
        append_point(folder / CURVE, {"step": each, "loss": 1.0 / each, "seconds": 0.5 * each})
    with Saver() as saver:
        saver.save(folder, list_trainable(layer), optimizer, step, 0.5 * step)
    (checkpoint,) = list_checkpoints(folder)
    return layer, checkpoint


def resume_from(folder: Path, layer: nn.Module) -> Any:
    """Resume a run of eight steps."""
    return resume(layer, TrainJob(settings=None, steps=8, lr=1.0, folder=folder, validate=dict))  # type: ignore[arg-type]


def flip(path: Path) -> None:
    """Flip two bits near the end of a file."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 0b101
    path.write_bytes(content)


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint and remove its index, as if an earlier version had written it."""
    (part,) = checkpoint.glob("*.safetensors")
    with safe_open(part, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(part)
    change(tensors)
    save_file(tensors, part, metadata)
    (checkpoint / INDEX).unlink()


def test_a_whole_checkpoint_is_resumed_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer, checkpoint = write_checkpoint(tmp_path)
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    with torch.no_grad():
        layer.weight.zero_()  # type: ignore[operator, union-attr]
    found, step, seconds, curve = resume_from(tmp_path, layer)
    assert (found, step, seconds) == (checkpoint, STEP, 0.5 * STEP)
    assert [point["step"] for point in curve] == [1, 2, 3, 4]
    load_checkpoint(checkpoint, list_trainable(layer))
    assert all(torch.equal(value, before[name]) for name, value in layer.named_parameters())
    index = json.loads((checkpoint / INDEX).read_text("utf-8"))
    assert index["files"].keys() == {path.name for path in checkpoint.glob("*.safetensors")} != set()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["*.safetensors", INDEX])
@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    layer, checkpoint = write_checkpoint(tmp_path)
    (path,) = checkpoint.glob(name)
    damage(path)
    for _ in range(2):
        with refused(str(checkpoint), path.name, "remove", "--again"):
            resume_from(tmp_path, layer)
    assert list_checkpoints(tmp_path) == [checkpoint]


def test_a_part_too_many_is_named(tmp_path: Path) -> None:
    layer, checkpoint = write_checkpoint(tmp_path)
    save_file({"other": torch.ones(2)}, checkpoint / "other.safetensors")
    with refused("other.safetensors"):
        resume_from(tmp_path, layer)


def test_the_checkpoint_before_is_offered(tmp_path: Path) -> None:
    layer, checkpoint = write_checkpoint(tmp_path)
    whole = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with Saver() as saver:
        saver.save(tmp_path, list_trainable(layer), torch.optim.AdamW(layer.parameters()), 6, 3.0)
    checkpoint.mkdir()  # as if it had not been removed yet when the process was killed
    for name, content in whole.items():
        (checkpoint / name).write_bytes(content)
    (path,) = (tmp_path / "checkpoint-6").glob("*.safetensors")
    flip(path)
    with refused("checkpoint-6", suggestion="checkpoint-4"):
        resume_from(tmp_path, layer)
    path.parent.rename(tmp_path / "elsewhere")
    assert resume_from(tmp_path, layer)[1] == STEP


@pytest.mark.parametrize("drop", [0, 1, 3])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_curve_with_a_hole_is_refused(tmp_path: Path, drop: int, indexed: bool) -> None:
    layer, checkpoint = write_checkpoint(tmp_path)
    lines = (tmp_path / CURVE).read_text("utf-8").splitlines(keepends=True)
    if not indexed:  # without digests, a damaged line is noticed, and a missing last one
        (checkpoint / INDEX).unlink()
        lines[drop] = lines[drop][:5] + "\n"
    else:
        del lines[drop]
    (tmp_path / CURVE).write_text("".join(lines), encoding="utf-8")
    with refused(str(checkpoint), CURVE):
        resume_from(tmp_path, layer)
    assert (tmp_path / CURVE).read_text("utf-8") == "".join(lines)


def test_points_after_the_checkpoint_do_not_matter(tmp_path: Path) -> None:
    layer, _ = write_checkpoint(tmp_path)
    with (tmp_path / CURVE).open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": 1.0, "seconds": 9.0}\n{"step": 6, "lo')
    assert [point["step"] for point in resume_from(tmp_path, layer)[3]] == [1, 2, 3, 4]
    assert resume_from(tmp_path, layer)[1] == STEP


@pytest.mark.parametrize("values", [(1e9, 2.0), (-1.0, 2.0), (float("nan"), 2.0), (4.0, -1.0), (4.0, float("nan"))])
def test_impossible_counters_are_refused(tmp_path: Path, values: tuple[float, float]) -> None:
    layer, checkpoint = write_checkpoint(tmp_path)
    rewrite(checkpoint, lambda tensors: tensors[COUNTERS].copy_(torch.tensor(values)))
    with refused(str(checkpoint), COUNTERS):
        read_counters(checkpoint)
    with refused(str(checkpoint), COUNTERS):
        resume_from(tmp_path, layer)


def test_more_steps_than_the_run_has_are_refused(tmp_path: Path) -> None:
    layer, checkpoint = write_checkpoint(tmp_path, step=9)
    with refused(str(checkpoint), "8 steps"):
        resume_from(tmp_path, layer)


@pytest.mark.parametrize("name", ["parameter.weight", "exp_avg.bias", COUNTERS])
@pytest.mark.parametrize("change", [lambda tensor: tensor.to(torch.int32), lambda tensor: torch.ones(5)])
def test_another_type_or_shape_is_refused(tmp_path: Path, name: str, change: Callable[[Any], Any]) -> None:
    layer, checkpoint = write_checkpoint(tmp_path)
    rewrite(checkpoint, lambda tensors: tensors.update({name: change(tensors[name])}))
    with refused(str(checkpoint), name):
        resume_from(tmp_path, layer)


def test_a_checkpoint_of_an_earlier_version_is_resumed_from_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer, checkpoint = write_checkpoint(tmp_path)
    (checkpoint / INDEX).unlink()
    check_checkpoint(checkpoint, list_trainable(layer))
    (line,) = capsys.readouterr().err.splitlines()
    assert str(checkpoint) in line


def test_a_full_disk_is_reported_with_the_bytes_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Linear(100, 100)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with refused("checkpoint-1", "40.4 kB needed", "free", "No space left"), Saver() as saver:
        saver.save(tmp_path, list_trainable(layer), torch.optim.AdamW(layer.parameters()), 1, 0.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_with_a_damaged_checkpoint_is_refused_until_it_starts_anew(world: World) -> None:
    run = compose([*world.overrides, "method=sft", "train.log_every=1"], world.conf)

    def crash(prepared: Any, point: dict[str, Any]) -> None:
        if point["step"] == 3:
            raise CrashError

    folder = prepare_run(run).folder
    for _ in range(2):  # the second time, the interrupted run itself was started with `--again`
        with pytest.raises(CrashError):
            execute(run, again=True, observe=crash)
        (checkpoint,) = list_checkpoints(folder)
        (part,) = checkpoint.glob("*.safetensors")
        flip(part)
        with refused(str(checkpoint), part.name, "--again"):
            execute(run)
        assert list_checkpoints(folder) == [checkpoint]
    steps: list[int] = []
    execute(run, again=True, observe=lambda prepared, point: steps.append(point["step"]))
    assert steps == [1, 2, 3, 4]
