"""A modular model's config.json and an expert's expert.json come from anywhere: every value is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from mode.artefacts.find import load_folder
from mode.artefacts.write import describe_model
from mode.core.digests import DIGEST
from mode.modular.artefact import load_experts, save_expert
from mode.modular.model import make_modular
from tests.support.refusals import refused

ODD = "../../<img src=x>"


def make_tiny(experts: list[str]) -> Any:
    """Make a modular model of 2 blocks, with a hidden size of 8."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = LlamaConfig(**sizes, num_key_value_heads=1, num_hidden_layers=2)
    return make_modular(AutoModelForCausalLM.from_config(config), experts=experts, num_blocks=2, expert_layers=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a saved modular model."""
    folder = tmp_path_factory.mktemp("saved")
    make_tiny(["one", "two"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"experts": None}, "experts"),
        ({"experts": "ab"}, "experts"),
        ({"experts": ["one", "one"]}, "one"),
        ({"experts": [ODD, "two"]}, ODD),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"num_blocks": -1}, "num_blocks=-1"),
        ({"num_blocks": True}, "num_blocks"),
        ({"num_blocks": 3}, "[1, 2]"),
        ({"expert_layers": 0}, "expert_layers=0"),
        ({"expert_layers": None}, "expert_layers"),
        ({"head_rank": -1}, "head_rank=-1"),
        ({"gate": {"top_k": True}}, "gate.top_k"),
        ({"gate": {"topk": 1}}, "gate.top_k?"),
        ({"backbone": [1]}, "backbone"),
        ({"decoder": {}}, "decoder.model_type"),
        ({"decoder": []}, "decoder.model_type"),
        ({"decoder": {"model_type": "none"}}, "decoder"),
        ({"decoder": {"model_type": "llama", "num_hidden_layers": 0}}, "decoder.num_hidden_layers"),
        ({"decoder": {"model_type": "llama", "num_hidden_layers": "2"}}, "decoder"),
        ({"decoder": {"model_type": "llama", "num_attention_heads": 0}}, "decoder"),
    ],
    ids=str,
)
def test_a_wrong_config_is_refused_by_name(saved: Path, changes: dict[str, Any], named: str) -> None:
    path = saved / "config.json"
    whole = path.read_text("utf-8")
    try:
        path.write_text(json.dumps(json.loads(whole) | changes), "utf-8")
        for read in (load_folder, load_experts):
            with refused(str(path), named):
                read(saved)
    finally:
        path.write_text(whole, "utf-8")
    assert list(load_experts(saved)) == ["one", "two"]


def test_a_domain_that_is_no_name_is_refused(tmp_path: Path) -> None:
    about = {"domain": "one", "backbone": "a`<b>", "backbone_fingerprint": "f", "num_blocks": 2, "expert_layers": 1}
    save_expert(make_tiny(["one"]), tmp_path, {**about, "steps": 1, "tokens": 1, "seed": 0})
    assert "`` a`<b> ``" in (tmp_path / "README.md").read_text("utf-8")
    path = tmp_path / "expert.json"
    written = json.loads(path.read_text("utf-8"))
    written.pop(DIGEST)
    for domain in (ODD, "true", None, 3):
        path.write_text(json.dumps({**written, "domain": domain}), "utf-8")
        with refused(str(path), f"domain={domain}"):
            load_experts(tmp_path)


def test_a_card_holds_no_markup_of_a_config() -> None:
    model = make_tiny(["one"])
    model.config.backbone = {"name": "a` <img src=x>", "fingerprint": "f", "path": "b` <img src=x>"}
    text = describe_model(model, embed=False)
    assert "`` a` <img src=x> ``" in text
    assert "`` b` <img src=x> ``" in text
