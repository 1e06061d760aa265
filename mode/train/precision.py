"""The precision of the forward and backward pass: fp32, or bf16 by autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mode.config.train import Train

WIDE = 256
"""Hidden size from which bf16 pays on a CPU with AMX tiles: a step gains little at 160, and a third or more at 256
(`mode bench options`). Without tiles, with other bf16 instructions, a step took 1.6 times as long as in fp32."""


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def choose_precision(settings: Train, model: nn.Module) -> str:
    """Return the precision of a model's forward pass on the model's device."""
    config: Any = model.config
    return resolve_precision(settings.precision, next(model.parameters()).device, config.get_text_config().hidden_size)


def resolve_precision(precision: str, device: torch.device, hidden: int) -> str:
    """Return the precision asked for; `auto` resolves to bf16 where it pays, else to fp32.

    Args:
        precision: `fp32`, `bf16` or `auto`.
        device: Device of the model.
        hidden: Hidden size of the model.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        pays = device.type == "cpu" and hidden >= WIDE and bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return "bf16" if pays else "fp32"
