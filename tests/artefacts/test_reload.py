"""A written model is the model that it was written from, with all files of its backbone that matter."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mode.artefacts.edit import merge_expert
from mode.artefacts.reload import check_reload
from mode.artefacts.write import write_model
from mode.backbone.load import CONFIG, WEIGHTS, fingerprint_weights, load_model
from mode.config.backbone import Backbone
from mode.modular.edit import extract_backbone
from mode.modular.model import MoDEForCausalLM, make_modular
from tests.conftest import World
from tests.support.refusals import refused

GENERATION = {"bos_token_id": 0, "eos_token_id": [0, 5], "temperature": 0.7, "top_p": 0.9}
"""Settings of a published model: they sample only if `do_sample` is set too, which the library warns about."""


@pytest.fixture
def place(world: World, tmp_path: Path) -> Path:
    """Return a copy of the pico backbone with chat templates and settings of generation."""
    folder = Path(shutil.copytree(world.conf.parent / "pico", tmp_path / "pico"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools: {{ messages[0].content }}", "utf-8")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION), "utf-8")
    return folder


def make_plain(place: Path) -> Any:
    return load_model(Backbone(name="pico", path=str(place)))


def make_modular_model(place: Path) -> MoDEForCausalLM:
    backbone = Backbone(name="pico", path=str(place))
    source = {"name": "pico", "path": str(place), "fingerprint": fingerprint_weights(backbone)}
    torch.manual_seed(0)
    return make_modular(
        load_model(backbone), experts=["a"], num_blocks=6, expert_layers=1, init="random", source=source
    ).eval()


def make_merged(place: Path) -> Any:
    return merge_expert(make_modular_model(place), [0.5] * 6)


MODELS = {"plain": make_plain, "modular": make_modular_model, "merged": make_merged}


def read_generation(folder: Path) -> dict[str, Any]:
    """Return the settings of generation in a folder that a backbone has too."""
    settings = GenerationConfig.from_pretrained(folder).to_dict()
    return {name: settings[name] for name in GENERATION}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "embed", "precision"),
    [("plain", True, "bf16"), ("modular", True, "bf16"), ("modular", False, "fp32"), ("merged", True, "fp32")],
)
def test_a_written_model_keeps_what_its_backbone_has(
    place: Path, tmp_path: Path, kind: str, embed: bool, precision: str
) -> None:
    out = tmp_path / "out"
    write_model(MODELS[kind](place), place, out, embed=embed, precision=precision)
    settings = GenerationConfig.from_pretrained(out).to_dict()
    assert {name: settings[name] for name in GENERATION} == GENERATION
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hello"
    assert tokenizer.apply_chat_template(chat, tokenize=False, chat_template="tools") == "tools: hello"
    card = (out / "README.md").read_text("utf-8")
    assert ("mode." in card) is (kind == "modular")  # only a modular model needs this package
    names: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0].replace('"out"', repr(str(out))), names)
    assert {name: names["model"].generation_config.to_dict()[name] for name in GENERATION} == GENERATION
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {parameter.dtype for parameter in names["model"].parameters()} == {expected}


def test_a_modular_model_and_its_backbone_have_the_same_generation_settings(place: Path, tmp_path: Path) -> None:
    make_modular_model(place).save_pretrained(tmp_path / "out")
    loaded = MoDEForCausalLM.from_pretrained(tmp_path / "out")
    for model in (loaded, extract_backbone(loaded)):
        assert {name: model.generation_config.to_dict()[name] for name in GENERATION} == GENERATION


def test_a_modular_model_loads_in_the_precision_that_it_was_saved_in_unless_another_is_asked_for(
    place: Path, tmp_path: Path
) -> None:
    make_modular_model(place).bfloat16().save_pretrained(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / CONFIG).read_text("utf-8"))
    assert settings["dtype"] == settings["decoder"]["dtype"] == "bfloat16"
    for options, expected in {"": torch.bfloat16, "auto": torch.bfloat16, "float32": torch.float32}.items():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **({"dtype": options} if options else {}))
        assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
        assert loaded.backbone.config.dtype == expected


def damage(folder: Path, change: float) -> None:
    """Change one matrix in a folder's weights."""
    tensors = load_file(folder / WEIGHTS)
    name = min(name for name in tensors if name.endswith("mlp.down_proj.weight"))
    save_file(tensors | {name: tensors[name] + change}, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "modular"])
def test_a_model_that_is_another_one_once_loaded_is_not_written(
    place: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[kind](place)
    save = model.save_pretrained

    def save_another(folder: Path, **options: Any) -> None:
        save(folder, **options)
        damage(folder, 0.1)

    monkeypatch.setattr(model, "save_pretrained", save_another)
    before = set(tmp_path.iterdir())
    with refused(str(tmp_path / "out"), "logits"):
        write_model(model, place, tmp_path / "out", embed=True)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_folder_that_does_not_load_is_refused_in_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mode.artefacts.reload.subprocess", subprocess)  # in place of `quick_reloads`
    model = make_plain(place)
    settings = json.loads((place / CONFIG).read_text("utf-8"))
    check_reload(model, place, "pico")
    (place / CONFIG).write_text(json.dumps(settings | {"dtype": "bfloat16"}), "utf-8")
    with refused("pico", "bfloat16", "float32"):
        check_reload(model, place, "pico")
    (place / WEIGHTS).unlink()
    with refused("pico", WEIGHTS):
        check_reload(model, place, "pico")
