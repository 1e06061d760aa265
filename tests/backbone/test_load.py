"""A backbone is what its folder describes: nothing is filled in, dropped, applied to it or fetched for it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM

from mode.backbone.load import ADAPTER, CONFIG, INDEX, WEIGHTS, fingerprint_weights, load_model
from mode.backbone.shape import read_shape
from mode.backbone.tokenizer import load_tokenizer
from mode.config.backbone import Backbone
from mode.modular.model import MoDEForCausalLM, make_modular
from tests.cli.test_cli import call, records
from tests.conftest import World
from tests.support.families import make_model
from tests.support.refusals import check_refused, refused

IDS = torch.tensor([[5, 17, 200, 3, 88, 41, 9, 120, 64]])


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    """Return a copy of the pico backbone."""
    return Path(shutil.copytree(world.conf.parent / "pico", tmp_path / "copy"))


def backbone(folder: Path) -> Backbone:
    return Backbone(name="copy", path=str(folder))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Write a folder's weights with a change."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def change_settings(folder: Path, **settings: Any) -> None:
    """Write a folder's configuration with some settings."""
    kept = json.loads((folder / CONFIG).read_text("utf-8"))
    (folder / CONFIG).write_text(json.dumps(kept | settings), "utf-8")


def make_export(folder: Path) -> None:
    """Replace a backbone's folder by a modular model on the backbone."""
    model = make_modular(load_model(backbone(folder)), experts=["a"], num_blocks=3, expert_layers=1, init="random")
    shutil.rmtree(folder)
    model.save_pretrained(folder)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids).logits


def test_a_missing_tensor_is_refused_and_not_drawn_at_random(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    with refused(str(folder), "model.layers.1.mlp.down_proj.weight"):
        load_model(backbone(folder))
    assert capfd.readouterr().err == ""  # the library's own report would be many lines


@pytest.mark.slow
def test_a_run_on_a_damaged_backbone_ends_in_one_line_and_writes_nothing(world: World, folder: Path) -> None:
    given = ("train", "baseline", "backbone", "backbone.name=copy", f"backbone.path={folder}")
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    check_refused(call(world, *given), "model.layers.1.mlp.down_proj.weight")
    assert not list(world.root.glob("results/**/*.json"))
    assert not list(world.root.glob("runs/*"))
    shutil.copyfile(world.conf.parent / "pico" / WEIGHTS, folder / WEIGHTS)
    assert call(world, *given).exit_code == 0
    (record,) = records(world)
    assert record.happened["parameters"]["added"] == 0


def test_a_missing_head_is_refused_unless_it_is_tied(folder: Path) -> None:
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    load_model(backbone(folder))
    change_settings(folder, tie_word_embeddings=False)
    with refused(str(folder), "lm_head.weight"):
        load_model(backbone(folder))


def test_layers_beyond_the_configuration_are_refused_and_not_dropped(folder: Path) -> None:
    change_settings(folder, num_hidden_layers=4)
    with refused(str(folder), "model.layers.4.", "more"):
        load_model(backbone(folder))


def test_tensors_of_another_shape_are_refused(folder: Path) -> None:
    change_settings(folder, vocab_size=310)
    with refused(str(folder), "model.embed_tokens.weight", "(300, 16)", "(310, 16)"):
        load_model(backbone(folder))


def test_a_tied_head_with_weights_of_its_own_is_refused(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(300, 16)}))
    with refused(str(folder), "tie_word_embeddings"):
        load_model(backbone(folder))


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    (folder / ADAPTER).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}), "utf-8")
    for read in (fingerprint_weights, load_model):
        with refused(str(folder), ADAPTER):
            read(backbone(folder))


BUFFERS = {
    "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64).tril(),
    "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64).tril(),
}


@pytest.mark.parametrize("name", sorted(BUFFERS))
def test_buffers_that_no_model_reads_change_neither_logits_nor_the_count(name: str, tmp_path: Path) -> None:
    model = make_model("gpt_neox" if name.startswith("gpt_neox") else "gpt2")
    model.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({name: BUFFERS[name]}))
    assert torch.equal(logits(load_model(backbone(tmp_path)), IDS % 50), logits(model, IDS % 50))
    assert read_shape(backbone(tmp_path)).parameters == sum(value.numel() for value in model.parameters())


def test_weight_files_that_the_library_does_not_read_change_nothing(folder: Path) -> None:
    before, size = fingerprint_weights(backbone(folder)), read_shape(backbone(folder)).parameters
    shutil.copyfile(folder / WEIGHTS, folder / "consolidated.safetensors")
    assert fingerprint_weights(backbone(folder)) == before
    read_shape.cache_clear()
    assert read_shape(backbone(folder)).parameters == size


def test_all_shards_of_the_index_are_read_and_fingerprinted(folder: Path) -> None:
    model = load_model(backbone(folder))
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(logits(load_model(backbone(folder))), logits(model))
    seen = {fingerprint_weights(backbone(folder))}
    (folder / "model-extra.safetensors").write_bytes(shards[0].read_bytes())
    assert fingerprint_weights(backbone(folder)) in seen
    for shard in shards:
        save_file({name: value + 1 for name, value in load_file(shard).items()}, shard, {"format": "pt"})
        seen.add(fingerprint_weights(backbone(folder)))
    assert len(seen) == len(shards) + 1
    shards[1].unlink()
    with refused(str(folder), shards[1].name, INDEX):
        fingerprint_weights(backbone(folder))


@pytest.mark.parametrize("content", ["[", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
def test_an_unreadable_index_is_refused(folder: Path, content: str) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(content, "utf-8")
    with refused(INDEX):
        fingerprint_weights(backbone(folder))


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "no such method"])
def test_a_quantized_checkpoint_is_refused(folder: Path, method: str) -> None:
    change_settings(folder, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    read_shape.cache_clear()
    for read in (read_shape, load_model):
        with refused("quantization_config", str(folder)):
            read(backbone(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"rope_parameters": {"rope_type": "none such"}},
        {"model_type": None},
        {"hidden_act": "none such"},
        {"dtype": "float7"},
    ],
)
def test_an_error_of_the_library_is_one_line(folder: Path, settings: dict[str, Any]) -> None:
    change_settings(folder, **settings)
    with refused("copy", str(folder)):
        load_model(backbone(folder))


def test_weights_elsewhere_than_in_the_usual_files_are_refused(folder: Path) -> None:
    shutil.copyfile(folder / WEIGHTS, folder / "shard-00000-model-00001-of-00001.safetensors")
    with refused(str(folder), WEIGHTS):
        fingerprint_weights(backbone(folder))
    (folder / "shard-00000-model-00001-of-00001.safetensors").rename(folder / "other.safetensors")
    change_settings(folder, transformers_weights="other.safetensors")
    with refused(str(folder), WEIGHTS):
        load_model(backbone(folder))


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(folder: Path) -> None:
    change_settings(folder, vocab_size=299)
    with refused(str(folder), "299"):
        load_tokenizer(backbone(folder))


@pytest.mark.parametrize("special", [True, False])
def test_a_special_token_without_an_embedding_is_refused_only_in_a_text(folder: Path, special: bool) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<image>", special=special)])
    tokenizer.save(str(folder / "tokenizer.json"))
    if not special:
        with refused(str(folder), "300"):
            load_tokenizer(backbone(folder))
        return
    loaded = load_tokenizer(backbone(folder))
    assert max(loaded.encode(["def f(x):"])[0]) < 300
    with refused("<image>", "300"):
        loaded.encode(["an", "an <image>"])


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("modular", [False, True])
def test_a_configuration_cannot_name_attention_from_the_hub(
    folder: Path, key: str, modular: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[Any] = []
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *a, **k: fetched.append(a))
    if modular:
        make_export(folder)
        decoder = json.loads((folder / CONFIG).read_text("utf-8"))["decoder"]
        change_settings(folder, decoder=decoder | {key: "some/kernel"}, **{key: "some/kernel"})
        model = MoDEForCausalLM.from_pretrained(folder)
        assert model.backbone.config._attn_implementation == "sdpa"
    else:
        change_settings(folder, **{key: "some/kernel"})
        read_shape.cache_clear()
        assert read_shape(backbone(folder)).layers[0].fused
        model = load_model(backbone(folder))
    assert model.config._attn_implementation == "sdpa"
    assert fetched == []


def test_the_caller_of_a_modular_model_chooses_its_attention(folder: Path) -> None:
    make_export(folder)
    for loader in (MoDEForCausalLM, AutoModelForCausalLM):
        model = loader.from_pretrained(folder, attn_implementation="eager")
        assert {model.config._attn_implementation, model.backbone.config._attn_implementation} == {"eager"}
        assert (logits(model) - logits(loader.from_pretrained(folder))).abs().max() < 1e-5


def test_code_in_a_folder_is_never_executed(folder: Path) -> None:
    (folder / "own.py").write_text("import sys\nsys.modules['executed_own_code'] = sys\n", "utf-8")
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tok", "own.Tok"]}
    expected = logits(load_model(backbone(folder)))
    change_settings(folder, auto_map=names)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"auto_map": names}), "utf-8")
    assert torch.equal(logits(load_model(backbone(folder))), expected)
    load_tokenizer(backbone(folder))
    change_settings(folder, model_type="own")  # only the folder's own code knows this architecture
    with refused("copy", str(folder)):
        load_model(backbone(folder))
    assert "executed_own_code" not in sys.modules


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: change_tensors(folder, lambda t: t.pop("blocks.1.gate.weight")), "blocks.1.gate.weight"),
        (
            lambda folder: change_tensors(folder, lambda t: t.update({"blocks.7.gate.weight": torch.ones(2)})),
            "blocks.7.",
        ),
        (
            lambda folder: change_tensors(folder, lambda t: t.update({"blocks.1.gate.bias": torch.ones(5)})),
            "blocks.1.gate.bias",
        ),
        (lambda folder: (folder / ADAPTER).write_text("{}", "utf-8"), ADAPTER),
    ],
)
def test_a_modular_model_is_exactly_what_its_folder_describes(folder: Path, damage: Any, named: str) -> None:
    make_export(folder)
    MoDEForCausalLM.from_pretrained(folder)
    damage(folder)
    with refused(str(folder), named):
        MoDEForCausalLM.from_pretrained(folder)


def test_the_loading_report_of_a_modular_model_is_returned_on_request(folder: Path) -> None:
    make_export(folder)
    model, report = MoDEForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, MoDEForCausalLM)
    assert not report["missing_keys"]
