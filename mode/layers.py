"""What the loop can ask of decoder layers: to keep fewer activations, and to be compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from mode.settings import Train


def decoder_layers(model: nn.Module) -> list[Any]:
    """Return a model's decoder layers, those of experts among them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class Layers:
    """A model's layers, which do as the settings of the loop say within its context: in training steps alone.

    A layer that is checkpointed keeps its input alone and forms its activations again in the backward pass, through the
    switch that `transformers` gives to every layer. Compiling is by layer: all layers of one shape share the code.
    """

    def __init__(self, model: nn.Module, settings: Train) -> None:
        """Choose the layers, and have them compiled when they are first used."""
        layers = decoder_layers(model)
        self.again = [layer for layer in layers if forms_again(layer, settings.activation_checkpointing)]
        self.compiled: list[tuple[Any, Any]] = []
        for layer in layers if settings.compile else ():
            layer.compile(dynamic=False)
            self.compiled.append((layer, layer._compiled_call_impl))
            layer._compiled_call_impl = None

    def __enter__(self) -> None:
        """Begin a step."""
        for layer in self.again:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        for layer, code in self.compiled:
            layer._compiled_call_impl = code

    def __exit__(self, *_: object) -> None:
        """End a step."""
        for layer in self.again:
            layer.gradient_checkpointing = False
        for layer, _code in self.compiled:
            layer._compiled_call_impl = None


def forms_again(layer: nn.Module, which: str) -> bool:
    """Say whether a layer's activations are to be formed again."""
    return which == "all" or (which == "frozen" and not any(each.requires_grad for each in layer.parameters()))
