"""Experts as parts: the artefact, what is refused, composing from folders and runs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mode.artefacts.find import find_model
from mode.config.compose import compose
from mode.core.digests import DIGEST, digest_json
from mode.core.tensors import load_tensors, save_tensors
from mode.modular.artefact import load_experts, read_descriptions, save_expert
from mode.modular.experts import extract_expert_state
from mode.records.record import Record
from mode.runs.execute import execute
from tests.cli.test_cli import assert_nothing_ran, call, records
from tests.conftest import World
from tests.modular.test_modular import modular
from tests.support.refusals import check_refused, refused

ABOUT = {
    "domain": "py",
    "backbone": "pico",
    "backbone_fingerprint": "f",
    "num_blocks": 3,
    "expert_layers": 1,
    "steps": 4,
    "tokens": 256,
    "seed": 0,
}


def stage_one(world: World, domain: str, *overrides: str) -> tuple[Record, Path]:
    """Train an expert and return its record and its folder."""
    given = ["method.start=fresh", "method.num_experts=1", f"targets=[{domain}]", *overrides]
    record = execute(compose([*world.overrides, *given], world.conf), weights=True)
    return record, world.root / "runs" / record.id / "expert"


def untargeted(world: World) -> World:
    """Return the world without targets of its own, so that a command line names them all."""
    return World(world.root, world.conf, tuple(text for text in world.overrides if not text.startswith("targets=")))


@pytest.fixture
def handed(world: World, tmp_path: Path) -> Path:
    """Return the folder of an expert for py that somebody hands over, far from its run."""
    _, folder = stage_one(world, "py")
    shutil.copytree(folder, tmp_path / "handed")
    shutil.rmtree(world.root / "runs")
    shutil.rmtree(world.root / "results")
    return tmp_path / "handed"


def test_an_expert_comes_back_as_it_was_saved(world: World, tmp_path: Path) -> None:
    model = modular(world, num_experts=1)
    save_expert(model, tmp_path / "expert", ABOUT)
    expert = load_experts(tmp_path / "expert")["py"]
    assert {key: expert.about[key] for key in ABOUT} == ABOUT
    assert expert.about["parameters"] == sum(value.numel() for value in expert.tensors.values())
    for name, value in extract_expert_state(model, 0).items():
        assert torch.equal(expert.tensors[name], value)
    card = (tmp_path / "expert" / "README.md").read_text("utf-8")
    assert "# MoDE expert: py" in card
    assert "{" not in card


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def change_weights(folder: Path) -> None:
    tensors, about = load_tensors(folder / "model.safetensors")
    tensors[next(iter(tensors))] += 1e-3
    save_tensors(folder / "model.safetensors", tensors, about)


def foreign_weights(folder: Path) -> None:
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def say(**changes: Any) -> Any:
    def edit(folder: Path) -> None:
        about = json.loads((folder / "expert.json").read_text("utf-8")) | changes
        about = {key: value for key, value in about.items() if value is not None and key != DIGEST}
        (folder / "expert.json").write_text(json.dumps(about | {DIGEST: digest_json(about)}), "utf-8")

    return edit


def edit_by_hand(folder: Path) -> None:
    about = json.loads((folder / "expert.json").read_text("utf-8"))
    (folder / "expert.json").write_text(json.dumps(about | {"steps": 1}), "utf-8")


def garble(folder: Path) -> None:
    (folder / "expert.json").write_text("[1, 2", "utf-8")


DAMAGES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "truncated weights": (cut, ("model.safetensors",)),
    "changed weights": (change_weights, ("model.safetensors", "expert.json")),
    "foreign weights": (foreign_weights, ("model.safetensors",)),
    "no weights": (no_weights, ("model.safetensors",)),
    "edited description": (edit_by_hand, ("expert.json",)),
    "garbled description": (garble, ("expert.json",)),
    "a list": (lambda folder: (folder / "expert.json").write_text("[]", "utf-8"), ("expert.json",)),
    "no domain": (say(domain=None), ("expert.json", "domain")),
    "another schema": (say(schema=2), ("expert.json", "schema 2", "1")),
    "another backbone": (say(backbone_fingerprint="0123"), ("pico", "0123")),
    "other blocks": (say(num_blocks=3), ("method.num_blocks=3", "num_blocks=6")),
    "other layers": (say(expert_layers=2), ("method.expert_layers=2", "expert_layers=1")),
    "unknown domain": (say(domain="law"), ("domain law",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_foreign_expert_is_refused_in_one_line_and_nothing_is_written(
    world: World, handed: Path, name: str
) -> None:
    damage, named = DAMAGES[name]
    damage(handed)
    check_refused(call(untargeted(world), "compose", str(handed), "sums"), *named)
    assert_nothing_ran(world)


@pytest.mark.slow
def test_composing_from_a_folder_equals_composing_from_the_run(world: World, handed: Path) -> None:
    composed = call(world, "compose", str(handed), "sums")
    assert composed.exit_code == 0, composed.output
    made = {record.id: record for record in records(world)}
    (from_folder,) = [record for record in made.values() if "artefacts" in record.asked]
    assert from_folder.asked["artefacts"] == {"py": read_descriptions(handed)["py"]["weights"]}
    assert str(handed) not in json.dumps(from_folder.asked)
    assert len(made) == 2  # the expert for sums, and the composition
    from_run = execute(compose([*world.overrides, "method=mode"], world.conf))
    assert from_run.id != from_folder.id
    assert from_run.happened["scores"] == from_folder.happened["scores"]
    # The same expert from another place is the same run.
    shutil.copytree(handed, handed.parent / "elsewhere")
    again = call(world, "compose", str(handed.parent / "elsewhere"), "sums")
    assert f"run {from_folder.id} is done" in again.stdout


@pytest.mark.slow
def test_experts_are_named_by_run_too(world: World) -> None:
    py, _ = stage_one(world, "py")
    sums, folder = stage_one(world, "sums")
    result = call(world, "compose", py.id, str(folder.parent))
    assert result.exit_code == 0, result.output
    assert len(records(world)) == 3
    assert call(world, "compose", py.id[:7], sums.id).stdout.startswith("run ")
    assert len(records(world)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("compose", "pyy", "sums"), ("pyy", "py?")),
        (("compose", "{handed}", "py"), ("py", "twice")),
        (("compose", "sums", "method.experts=['{handed}']"), ("py", "targets=['sums']")),
        (("compose", "py", "sums", "method.experts=['{handed}', '{handed}/.']"), ("{handed}", "both", "py")),
        (("compose", "--uninitialized", "{handed}", "sums"), ("experts",)),
    ],
)
def test_mistakes_of_naming_are_told_in_one_line(
    world: World, handed: Path, words: tuple[str, ...], named: tuple[str, ...]
) -> None:
    given, expected = ([text.replace("{handed}", str(handed)) for text in texts] for texts in (words, named))
    check_refused(call(untargeted(world), *given), *expected)
    assert_nothing_ran(world)


@pytest.mark.slow
def test_an_expert_of_one_domain_takes_its_own_share_of_equal_tokens(world: World, handed: Path) -> None:
    given = [*world.overrides, "method=mode", "budget=data", "train.steps=6", f"method.experts=['{handed}']"]
    run = compose(given, world.conf)
    assert [stage.train.steps for stage in run.method.needs(run)] == [3]
    assert run.method.steps(run) == 3


def test_nowhere_is_no_expert(tmp_path: Path) -> None:
    with refused("nowhere", "expert.json"):
        load_experts(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["expert.json", "config.json"])
def test_a_description_that_is_nested_too_deeply_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"a":' * 100_000, encoding="utf-8")
    with refused(str(tmp_path)):
        load_experts(tmp_path)
    with refused(str(tmp_path)):
        find_model(str(tmp_path), tmp_path / "runs")


@pytest.mark.parametrize("change", [lambda value: value.int(), lambda value: value * math.nan])
def test_experts_of_a_saved_model_are_finite_fractions(world: World, tmp_path: Path, change: Any) -> None:
    modular(world, num_experts=1).save_pretrained(tmp_path / "model")
    assert load_experts(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if ".experts.0." in name)
    save_file(tensors | {name: change(tensors[name])}, path)
    with refused(str(tmp_path / "model"), name.partition(".experts.0.")[2]):
        load_experts(tmp_path / "model")
