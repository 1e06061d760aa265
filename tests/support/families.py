"""Tiny random models of every supported family, with what makes each of them special switched on."""

from __future__ import annotations

from typing import Any

import torch

LAYERS = 6
VOCABULARY = 128
HIDDEN = 32

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"] * 2
"""Kinds of layers that differ within every block of two or three layers."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": False},
    "phi3": {"num_key_value_heads": 4},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": MIXED},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": MIXED},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "gpt_neox": {"num_key_value_heads": None, "rotary_pct": 0.5},
    "gpt2": {"num_key_value_heads": None, "intermediate_size": None, "tie_word_embeddings": True},
}


def make_model(family: str, seed: int = 0) -> Any:
    """Return a tiny causal LM of a family with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {name: value for name, value in (SHAPE | FAMILIES[family]).items() if value is not None}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).eval()


def check_generation(model: Any, ids: torch.Tensor) -> None:
    """See that padding on the left and a cache change nothing of what a model generates, nor of its beams."""
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand(2, -1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], plain)
    beams = model.generate(ids, num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **options))
