"""Frozen matrices in eight bits: a scale for every row, and products with what that gives back, in either pass.

Nothing is computed in eight bits. What is spared is memory: a byte a weight where fp32 has four, and a step in bf16 two
more for a copy. `torchao` has tensors of the kind, but those of int8 take no part in autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.backbone.structure import find_decoder_layers
from mode.core.errors import ConfigError

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class QuantizedProduct(torch.autograd.Function):
    """x W^T, whose backward pass makes W from its eight bits once more, so that no pass keeps it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        """Map (..., d) to (..., o)."""
        ctx.save_for_backward(values, scale)
        return functional.linear(x, dequantize(values, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Map the gradient of what went out, (..., o), to that of what came in, (..., d)."""
        values, scale = ctx.saved_tensors
        return grad @ dequantize(values, scale, grad.dtype), None, None


class QuantizedLinear(nn.Module):
    """A frozen linear map, d inputs to o outputs.

    Attributes:
        values: W / scale in eight bits, (o, d); fp8 as plain bytes, which every backend can send.
        scale: Largest number of every row as a share of the largest of the kind, (o, 1), fp32.
        bias: As it was, (o,), or None.
        kind: Kind of the eight bits.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, base: Any, kind: torch.dtype) -> None:
        """Take the place of a linear layer, or of GPT-2's, whose matrix is (d, o)."""
        super().__init__()
        weight = base.weight.detach() if type(base) is nn.Linear else base.weight.detach().T.contiguous()
        values, scale = quantize(weight, kind)
        self.register_buffer("values", values if kind is torch.int8 else values.view(torch.uint8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias, self.kind = base.bias, kind

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., o)."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        values = self.values if self.kind is torch.int8 else self.values.view(self.kind)
        out: Tensor = QuantizedProduct.apply(x, values, self.scale)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)


def quantize(weight: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a matrix, (o, d), in eight bits and the scale of every row, (o, 1): rounded to the nearest."""
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST[kind]
    shares = weight.float() / scale
    return (shares.round() if kind is torch.int8 else shares).to(kind), scale


def dequantize(values: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """Return a matrix, (o, d), from its eight bits, in the kind of number that it is multiplied with."""
    return values.to(kind).mul_(scale)


def quantize_frozen(model: nn.Module, choice: str) -> None:
    """Hold what is frozen of the linear maps in decoder layers in eight bits, in place; `full` leaves all as it is.

    Args:
        model: A model, with what is frozen frozen.
        choice: `full`, `int8` or `fp8`.

    Raises:
        ConfigError: No such map is frozen.
    """
    if choice == "full":
        return
    from transformers.pytorch_utils import Conv1D

    made: dict[nn.Module, QuantizedLinear] = {}
    for layer in find_decoder_layers(model):
        for path, module in list(layer.named_modules()):
            if type(module) in (nn.Linear, Conv1D) and not module.weight.requires_grad:
                if module not in made:
                    made[module] = QuantizedLinear(module, KINDS[choice])
                layer.set_submodule(path, made[module])
    if not made:
        raise ConfigError(f"train.memory.frozen_weights={choice}: no linear map of this model's layers is frozen")
