"""The precision of a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mode.config.train import Train

WIDE = 256
"""Hidden size from which bf16 pays on a processor with tiles (AMX): a step gains little at 160, a third and more at 256
(`mode bench options`). With tiles switched off, by other bf16 instructions, it took 1.6 times as long as in fp32."""


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def choose_precision(settings: Train, model: nn.Module) -> str:
    """Return the precision of a model's forward pass, where it is."""
    config: Any = model.config
    return resolve_precision(settings.precision, next(model.parameters()).device, config.get_text_config().hidden_size)


def resolve_precision(precision: str, device: torch.device, hidden: int) -> str:
    """Return a precision that is asked for, or what `auto` stands for: bf16 where it pays, else fp32.

    Args:
        precision: `fp32`, `bf16` or `auto`.
        device: Where a model is.
        hidden: Its hidden size.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        pays = device.type == "cpu" and hidden >= WIDE and bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return "bf16" if pays else "fp32"
