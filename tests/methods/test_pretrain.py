"""Backbones: pretraining is repeatable bit for bit, and what it writes is a backbone like any other."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mode.backbone.load import fingerprint_weights, load_model, locate, read_pretraining_data
from mode.backbone.shape import read_shape
from mode.backbone.tokenizer import load_tokenizer
from mode.config.backbone import Backbone
from mode.config.check import replace_settings
from mode.config.compose import compose
from mode.runs.execute import execute
from mode.runs.prepare import prepare_run
from tests.conftest import World, make_backbone
from tests.support.models import fingerprint_model
from tests.support.refusals import refused

SHORT = (
    "experiment=pretrain_tiny",
    "targets=[prose,py,sums]",
    "~method.weights",
    "+method.weights={prose:2,py:1,sums:1}",
    "method.vocab_size=300",
    "method.hidden_size=16",
    "method.intermediate_size=32",
    "method.num_layers=6",
    "method.num_heads=2",
    "train.steps=6",
    "train.batch.size=4",
    "train.sequence_length=32",
    "train.log_every=2",
    "train.checkpoint_every=2",
    "train.validate_every=4",
    "train.threads=1",
    "evaluate.domains=[sums,py,prose]",
    "track=none",
)


def pretrain(world: World) -> Any:
    paths = [text for text in world.overrides if text.startswith("paths.")]
    return compose([*SHORT, *paths], world.conf)


@pytest.mark.slow
def test_pretraining_twice_gives_the_same_bits(world: World, shared_world: World, tmp_path: Path) -> None:
    other = shared_world.at(tmp_path / "other")
    runs = [pretrain(each) for each in (world, other)]
    records = [execute(run) for run in runs]
    folders = [prepare_run(run).folder / "backbone" for run in runs]
    files = ["model.safetensors", "tokenizer.json", "config.json"]
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in files)
    assert records[0].happened["scores"] == records[1].happened["scores"]
    curve = records[0].happened["curve"]
    assert [point["step"] for point in curve if "validation/prose/accuracy" in point] == [4, 6]


@pytest.mark.slow
def test_a_domain_that_is_scored_alone_needs_no_pretraining_split(world: World) -> None:
    run = pretrain(world)
    splits = {"test": 0.1, "validation": 0.1, "train": 0.8}
    alone = replace_settings(run.domains["sums"], splits=splits)
    mixed = replace_settings(run.method, weights={"prose": 2, "py": 1})
    changed = replace_settings(run, targets=("prose", "py"), domains=run.domains | {"sums": alone}, method=mixed)
    assert changed.scored[0] == "sums"
    assert execute(changed).outcome.steps == 6


@pytest.mark.slow
def test_a_pretrained_backbone_is_adapted_like_any_other(world: World) -> None:
    run = pretrain(world)
    made = execute(run)
    folder = prepare_run(run).folder / "backbone"
    adapted = [text for text in world.overrides if text != "backbone=pico"]
    bare = execute(compose([*adapted, f"backbone.path={folder}", "method=backbone"], world.conf))
    for domain, score in made.happened["scores"].items():
        assert bare.happened["scores"][domain]["accuracy"] == score["accuracy"]
    assert made.happened["parameters"]["added"] == made.happened["parameters"]["total"]
    assert bare.happened["parameters"] == {"total": made.happened["parameters"]["total"], "trainable": 0, "added": 0}


@pytest.mark.slow
def test_pretraining_never_sees_what_adaptation_trains_on(world: World) -> None:
    prepared = prepare_run(pretrain(world))
    for packed in prepared.packed.values():
        parts = {}
        for split in ("pretrain", "train", "validation", "test"):
            stream = packed.split(split)
            starts = stream.starts.tolist()
            bounds = pairwise(starts)
            parts[split] = {stream.tokens[begin:end].tobytes() for begin, end in bounds}
        assert not parts["pretrain"] & (parts["train"] | parts["validation"] | parts["test"])
        assert not parts["train"] & (parts["validation"] | parts["test"])


def test_loading_counts_and_fingerprints_without_loading(world: World, tmp_path: Path) -> None:
    backbone = Backbone(name="pico", path=str(world.conf.parent / "pico"))
    model = load_model(backbone)
    assert read_shape(backbone).parameters == sum(parameter.numel() for parameter in model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert fingerprint_model(model) == fingerprint_model(load_model(backbone))
    copied = tmp_path / "copied"
    shutil.copytree(backbone.path, copied)
    again = Backbone(name="pico", path=str(copied))
    assert fingerprint_weights(backbone) == fingerprint_weights(again)
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint_weights(backbone) != fingerprint_weights(again)


def test_fingerprint_changes_with_a_single_weight(world: World, tmp_path: Path) -> None:
    make_backbone(tmp_path / "twin")
    twin = Backbone(name="twin", path=str(tmp_path / "twin"))
    assert fingerprint_weights(twin) == fingerprint_weights(Backbone(name="pico", path=str(world.conf.parent / "pico")))
    model = load_model(twin)
    model.model.norm.weight.data[0] += 1e-3
    model.save_pretrained(tmp_path / "twin")
    assert fingerprint_weights(twin) != fingerprint_weights(Backbone(name="pico", path=str(world.conf.parent / "pico")))


def test_tokenizer_round_trip_and_end_of_sequence(world: World) -> None:
    tokenizer = load_tokenizer(Backbone(name="pico", path=str(world.conf.parent / "pico")))
    text = "def f(x):\n    return x + 1  # naïve ünïcode ✓"
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text
    assert tokenizer.eos_id == 0
    assert tokenizer.vocab_size == 300


@pytest.mark.parametrize("path", ["embedded:nothing", "./nowhere", "/no/such/folder", "a/b/c"])
def test_a_backbone_that_is_not_there_is_told_in_one_line(path: str) -> None:
    with refused(f"backbone.path={path}"):
        locate(Backbone(name="x", path=path))


def test_other_formats_and_architectures_are_refused(world: World, tmp_path: Path) -> None:
    make_backbone(tmp_path / "b")
    settings = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**settings, "model_type": "bert"}))
    with refused("backbone b", "bert", "llama"):
        load_model(Backbone(name="b", path=str(tmp_path / "b")))
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "b" / "pytorch_model.bin")
    with refused(str(tmp_path / "b"), "model.safetensors"):
        fingerprint_weights(Backbone(name="b", path=str(tmp_path / "b")))


def test_truncated_weights_are_told_in_one_line(world: World, tmp_path: Path) -> None:
    make_backbone(tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with refused("backbone b", str(tmp_path / "b")):
        load_model(Backbone(name="b", path=str(tmp_path / "b")))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"data": null}', '{"data": {"py": {}}}', '{"a":' * 100_000])
def test_a_damaged_note_of_the_pretraining_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "pretraining.json").write_text(content, encoding="utf-8")
    with refused(str(tmp_path / "pretraining.json")):
        read_pretraining_data(Backbone(name="some", path=str(tmp_path)))
