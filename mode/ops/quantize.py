"""Frozen matrices stored in eight bits, with one scale per row, and dequantized for every matrix product.

Nothing is computed in eight bits. Quantization saves memory: a weight takes one byte. It takes four bytes in fp32, and
two more for the copy that a bf16 step makes. `torchao` has similar tensors, but its int8 tensors do not support
autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.backbone.structure import find_decoder_layers
from mode.core.errors import ConfigError

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest value of each data type."""


KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Data type of each eight-bit format."""


class QuantizedProduct(torch.autograd.Function):
    """x W^T with a quantized W. The backward pass dequantizes W again, so W is not kept between the passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        """Map (..., d) to (..., o)."""
        ctx.save_for_backward(values, scale)
        return functional.linear(x, dequantize(values, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Map the gradient of the output, (..., o), to the gradient of x, (..., d)."""
        values, scale = ctx.saved_tensors
        return grad @ dequantize(values, scale, grad.dtype), None, None


class QuantizedLinear(nn.Module):
    """A frozen, quantized linear layer with d inputs and o outputs.

    Attributes:
        values: W / scale in eight bits, (o, d). fp8 is stored as uint8, which every communication backend supports.
        scale: Largest absolute value of every row divided by the largest value of the data type, (o, 1), in fp32.
        bias: The bias, unchanged, (o,), or None.
        kind: Data type of the eight bits.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, base: Any, kind: torch.dtype) -> None:
        """Quantize a linear layer, or a `Conv1D` of GPT-2, whose matrix is (d, o).

        Args:
            base: The layer.
            kind: Data type of the eight bits.
        """
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
    """Quantize a matrix, (o, d), with rounding to the nearest value; return it and the scale of every row, (o, 1)."""
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST[kind]
    scaled = weight.float() / scale
    return (scaled.round() if kind is torch.int8 else scaled).to(kind), scale


def dequantize(values: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """Return a quantized matrix, (o, d), in the data type of the matrix product."""
    return values.to(kind).mul_(scale)


def quantize_frozen(model: nn.Module, choice: str) -> None:
    """Quantize the frozen linear layers in a model's decoder layers, in place.

    Args:
        model: A model whose frozen parameters require no gradient.
        choice: `int8` or `fp8`; `full` leaves the model unchanged.

    Raises:
        ConfigError: No linear layer in the decoder layers is frozen.
    """
    if choice == "full":
        return
    from transformers.pytorch_utils import Conv1D

    replacements: dict[nn.Module, QuantizedLinear] = {}
    for layer in find_decoder_layers(model):
        for path, module in list(layer.named_modules()):
            if type(module) in (nn.Linear, Conv1D) and not module.weight.requires_grad:
                if module not in replacements:
                    replacements[module] = QuantizedLinear(module, KINDS[choice])
                layer.set_submodule(path, replacements[module])
    if not replacements:
        raise ConfigError(f"train.memory.frozen_weights={choice}: this model has no frozen linear layer; use full")
