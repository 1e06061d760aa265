"""Composition: values set on what is kept of Hydra's work are what Hydra makes of all in one go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from mode.config.check import fill_defaults
from mode.config.compose import compose_plain
from mode.config.groups import list_members
from mode.core.errors import ConfigError

DOMAINS = [f"+domain@domains.{name}={name}" for name in list_members("domain")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["seed=3", "train.lr=3e-4", "seed=4"],
        ["train.lr=1e-2", "method=lora", "method.rank=4", "method.target_modules=[q_proj,v_proj]"],
        ["experiment=table1_long", "train.steps=7", "budget=data"],
        ["+train.note='a, b: {c}'", "++seed=5", "~track.mode", "method=mode"],
        ["targets=[]", "train.batch.replay={english: 0.2}", "paths.runs='/tmp/${seed}'"],
        ["domains.code.licence=mine", "+domains.code.more={a: [1, null]}"],
    ],
)
def test_values_on_a_kept_composition_are_those_of_one_composition(overrides: list[str]) -> None:
    groups = ("method=", "experiment=", "budget=")
    values = [text for text in overrides if not text.startswith(groups)]
    chosen = [text for text in overrides if text.startswith(groups)]
    with initialize_config_module("conf", version_base="1.3"):
        plain: Any = OmegaConf.to_container(hydra_compose("run", overrides=[*DOMAINS, *chosen]))
    store = ConfigStore.instance()
    store.store("filled", fill_defaults(plain))
    with initialize(version_base="1.3"):
        expected = OmegaConf.to_container(hydra_compose("filled", overrides=values), resolve=True)
    for _ in range(2):  # the second time from what was kept, which the first must not have changed
        assert compose_plain(overrides) == expected


@pytest.mark.parametrize("override", ["train.lr.x=1", "~nothing", "+seed=1", "hydra.nothing=1", "table=table1"])
def test_what_hydra_refuses_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        compose_plain([override])


def test_a_file_that_was_changed_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "method" / "mine.yaml"
    path.parent.mkdir()
    for time, rank in enumerate((3, 5)):
        path.write_text(f"_target_: baselines.lora.Lora\nrank: {rank}\n", encoding="utf-8")
        os.utime(path, (time, time))
        assert compose_plain(["method=mine"], tmp_path)["method"]["rank"] == rank
