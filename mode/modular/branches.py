"""Execute the branches of a block: one after the other, experts of one shape as one computation, or on CUDA streams.

Shapes: N experts, B rows, S tokens per row, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_leaves

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments that the decoder passes to a layer after its input."""


def run_layers(layers: Any, states: Tensor, calls: Sequence[Call]) -> Tensor:
    """Run a stack of decoder layers, (B, S, d) to (B, S, d)."""
    for index, layer in enumerate(layers):
        args, options = calls[index % len(calls)]
        states = layer(states, *args, **options)
    return states


def run_batched(experts: Sequence[Any], states: Tensor, calls: Sequence[Call]) -> list[Tensor]:
    """Run experts of one shape as one computation, a layer of all of them at a time.

    The weights are stacked in every forward pass, so that each stays a parameter of its own. This pays where kernel
    launches take longer than matrix products, as on a GPU with few tokens.

    Args:
        experts: N stacks of decoder layers.
        states: Input, (B, S, d).
        calls: Arguments of each layer, without a cache.

    Returns:
        N outputs, (B, S, d).
    """
    for index, layers in enumerate(zip(*experts, strict=True)):
        args, options = calls[index % len(calls)]
        template = layers[0]
        weights = {
            name: torch.stack([layer.get_parameter(name) for layer in layers])
            for name, _ in template.named_parameters()
        }

        def one(some: dict[str, Tensor], x: Tensor, layer: Any = template, call: Call = (args, options)) -> Tensor:
            output: Tensor = functional_call(layer, some, (x, *call[0]), call[1])
            return output

        states = vmap(one, in_dims=(0, 0 if index else None), randomness="different")(weights, states)
    return list(states)


def run_on_streams(branches: Sequence[Any], states: Tensor, calls: Sequence[Call]) -> list[Tensor]:
    """Run each branch on a CUDA stream, the first on the current stream; the backward passes use the same streams.

    Args:
        branches: Stacks of decoder layers.
        states: Input, (B, S, d).
        calls: Arguments of each layer.

    Returns:
        Outputs, (B, S, d); the current stream waits for them.
    """
    here = torch.cuda.current_stream()
    streams = [here, *(get_stream(number) for number in range(1, len(branches)))]
    outputs = []
    for other in streams[
        1:
    ]:  # before the first branch is launched on the current stream: the others must not wait for it
        other.wait_stream(here)
    for layers, other in zip(branches, streams, strict=True):
        with torch.cuda.stream(other):
            outputs.append(run_layers(layers, states, calls))
    for output, other in zip(outputs[1:], streams[1:], strict=True):
        here.wait_stream(other)
        for read in (states, *collect_tensors(calls)):
            read.record_stream(other)
        output.record_stream(here)
    return outputs


def collect_tensors(calls: Sequence[Call]) -> list[Tensor]:
    """Return the tensors among the layers' arguments: masks and rotary embeddings."""
    leaves = tree_leaves([(args, options) for args, options in calls])
    return [each for each in leaves if isinstance(each, Tensor)]


@cache
def get_stream(number: int) -> torch.cuda.Stream:
    """Return the stream of a number, always the same one, so that memory freed on it is reused."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
