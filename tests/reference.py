"""MoDE on a Llama, written slowly from the equations: per token, branch and head, in float64, from weights alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale a vector to unit root mean square, then by a weight."""
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate the pairs (i, i + half) of a head's vector by position-dependent angles."""
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def layer(
    states: list[Tensor], w: dict[str, Tensor], heads: int, groups: int, eps: float, theta: float
) -> list[Tensor]:
    """Run one decoder layer over a sequence of vectors, token by token."""
    size = len(w["self_attn.q_proj.weight"]) // heads
    normed = [rms_norm(x, w["input_layernorm.weight"], eps) for x in states]
    queries, keys, values = (
        [(w[f"self_attn.{name}_proj.weight"] @ x).split(size) for x in normed] for name in ("q", "k", "v")
    )
    out = []
    for t, x in enumerate(states):
        mixed = []
        for head in range(heads):
            group = head * groups // heads
            query = rotate(queries[t][head], t, theta)
            logits = torch.stack([query @ rotate(keys[s][group], s, theta) / math.sqrt(size) for s in range(t + 1)])
            weights = torch.exp(logits - logits.max())
            weights = weights / weights.sum()
            mixed.append(sum(weights[s] * values[s][group] for s in range(t + 1)))
        x = x + w["self_attn.o_proj.weight"] @ torch.cat(mixed)
        normed_x = rms_norm(x, w["post_attention_layernorm.weight"], eps)
        gate = w["mlp.gate_proj.weight"] @ normed_x
        inner = gate / (1 + torch.exp(-gate)) * (w["mlp.up_proj.weight"] @ normed_x)
        out.append(x + w["mlp.down_proj.weight"] @ inner)
    return out


def sub(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def mode_logits(model: torch.nn.Module, ids: list[int]) -> Tensor:
    """Return the logits of a modular Llama for one sequence, (S, V), by equations 1 and 2."""
    config = model.config.decoder
    state = {name.removeprefix("backbone."): value.double() for name, value in model.state_dict().items()}
    theta = config.rope_parameters["rope_theta"]
    shape = (config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps, theta)
    states = [state["model.embed_tokens.weight"][token] for token in ids]
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
                x, index = layer(x, sub(branch, f"{index}."), *shape), index + 1
            outputs.append(x)
        mixed = []
        for t, x in enumerate(states):
            logits = own["gate.weight"] @ x + own["gate.bias"]
            alpha = torch.exp(logits) / torch.exp(logits).sum()
            mixed.append(sum(alpha[j] * outputs[j][t] for j in range(len(branches))))
        states, block = mixed, block + 1
    norm = state["model.norm.weight"]
    return torch.stack([state["lm_head.weight"] @ rms_norm(x, norm, config.rms_norm_eps) for x in states])
