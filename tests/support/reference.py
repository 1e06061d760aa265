"""MoDE written slowly from the equations: per token, branch and head, in float64, from weights alone.

Three families: Llama, Qwen3 (norms of queries and keys) and GPT-2 (layer norms, learned positions, biases).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


def sub(state: State, prefix: str) -> State:
    """Return the entries under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale a vector to unit root mean square, then by a weight."""
    return x / torch.sqrt((x * x).mean() + eps) * weight


def layer_norm(x: Tensor, w: State, eps: float) -> Tensor:
    """Shift a vector to zero mean and scale it to unit variance, then scale and shift by weights."""
    centred = x - x.mean()
    return centred / torch.sqrt((centred * centred).mean() + eps) * w["weight"] + w["bias"]


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate the pairs (i, i + half) of a head's vector by position-dependent angles."""
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def attend(queries: list[list[Tensor]], keys: list[list[Tensor]], values: list[list[Tensor]]) -> list[Tensor]:
    """Attend from every token to those up to it, head by head; heads share keys and values in groups."""
    out = []
    for t in range(len(queries)):
        mixed = []
        for head, query in enumerate(queries[t]):
            group = head * len(keys[t]) // len(queries[t])
            logits = torch.stack([query @ keys[s][group] / math.sqrt(len(query)) for s in range(t + 1)])
            weights = torch.exp(logits - logits.max())
            weights = weights / weights.sum()
            mixed.append(sum(weights[s] * values[s][group] for s in range(t + 1)))
        out.append(torch.cat(mixed))
    return out


def llama_layer(states: list[Tensor], w: State, config: Any) -> list[Tensor]:
    """Run one Llama or Qwen3 layer over a sequence of vectors."""
    eps, theta = config.rms_norm_eps, config.rope_parameters["rope_theta"]
    size = len(w["self_attn.q_proj.weight"]) // config.num_attention_heads
    normed = [rms_norm(x, w["input_layernorm.weight"], eps) for x in states]

    def heads(name: str, t: int) -> list[Tensor]:
        parts = list((w[f"self_attn.{name}_proj.weight"] @ normed[t]).split(size))
        norm = w.get(f"self_attn.{name}_norm.weight")
        if norm is not None:
            parts = [rms_norm(part, norm, eps) for part in parts]
        return parts if name == "v" else [rotate(part, t, theta) for part in parts]

    queries, keys, values = ([heads(name, t) for t in range(len(states))] for name in ("q", "k", "v"))
    out = []
    for x, mixed in zip(states, attend(queries, keys, values), strict=True):
        x = x + w["self_attn.o_proj.weight"] @ mixed
        normed_x = rms_norm(x, w["post_attention_layernorm.weight"], eps)
        gate = w["mlp.gate_proj.weight"] @ normed_x
        inner = gate / (1 + torch.exp(-gate)) * (w["mlp.up_proj.weight"] @ normed_x)
        out.append(x + w["mlp.down_proj.weight"] @ inner)
    return out


def gpt2_layer(states: list[Tensor], w: State, config: Any) -> list[Tensor]:
    """Run one GPT-2 layer over a sequence of vectors; its matrices are stored input first."""
    eps, width = config.layer_norm_epsilon, len(states[0])
    size = width // config.num_attention_heads
    normed = [layer_norm(x, sub(w, "ln_1."), eps) for x in states]
    joint = [x @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"] for x in normed]
    queries, keys, values = ([list(x.split(width)[part].split(size)) for x in joint] for part in range(3))
    out = []
    for x, mixed in zip(states, attend(queries, keys, values), strict=True):
        x = x + mixed @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]
        inner = layer_norm(x, sub(w, "ln_2."), eps) @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"]
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        out.append(x + inner @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"])
    return out


def blocks_out(states: list[Tensor], state: State, layer: Callable[..., list[Tensor]], config: Any) -> list[Tensor]:
    """Run every block by equations 1 and 2."""
    block = 0
    while any(name.startswith(f"blocks.{block}.") for name in state):
        own = sub(state, f"blocks.{block}.")
        branches = [sub(own, "backbone.")]
        while sub(own, f"experts.{len(branches) - 1}."):
            branches.append(sub(own, f"experts.{len(branches) - 1}."))
        outputs = []
        for branch in branches:
            x, index = states, 0
            while sub(branch, f"{index}."):
                x, index = layer(x, sub(branch, f"{index}."), config), index + 1
            outputs.append(x)
        mixed = []
        for t, x in enumerate(states):
            logits = own["gate.weight"] @ x + own["gate.bias"]
            alpha = torch.exp(logits) / torch.exp(logits).sum()
            mixed.append(sum(alpha[j] * outputs[j][t] for j in range(len(branches))))
        states, block = mixed, block + 1
    return states


def mode_logits(model: torch.nn.Module, ids: list[int]) -> Tensor:
    """Return the logits of a modular model for one sequence, (S, V)."""
    config = model.config.decoder
    state = {name.removeprefix("backbone."): value.double() for name, value in model.state_dict().items()}
    head = state["lm_head.weight"]
    if config.model_type == "gpt2":
        tokens, places = state["transformer.wte.weight"], state["transformer.wpe.weight"]
        states = [tokens[token] + places[t] for t, token in enumerate(ids)]
        out = blocks_out(states, state, gpt2_layer, config)
        final = [layer_norm(x, sub(state, "transformer.ln_f."), config.layer_norm_epsilon) for x in out]
    else:
        states = [state["model.embed_tokens.weight"][token] for token in ids]
        out = blocks_out(states, state, llama_layer, config)
        final = [rms_norm(x, state["model.norm.weight"], config.rms_norm_eps) for x in out]
    return torch.stack([head @ x for x in final])
