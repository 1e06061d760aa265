"""How the branches of a block run beside each other: experts of one shape as one computation, or on CUDA streams.

Shapes: N experts, B rows, S tokens per row, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.utils._pytree import tree_leaves

UNMASKED = "mode_unmasked"
"""Name by which `transformers` knows `causal_attention`, which has no mask made beside it."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What the decoder gives to a layer besides its input."""


def run_layers(layers: Any, states: Tensor, calls: Sequence[Call]) -> Tensor:
    """Run a stack of decoder layers, (B, S, d) to (B, S, d)."""
    for index, layer in enumerate(layers):
        args, options = calls[index % len(calls)]
        states = layer(states, *args, **options)
    return states


def run_batched(experts: Sequence[Any], states: Tensor, calls: Sequence[Call]) -> list[Tensor]:
    """Run experts of one shape as one computation, a layer of all of them at a time.

    Their weights are stacked anew every time, so that each remains a parameter of its own: worth it where launches
    take longer than products, as on a GPU with few tokens.

    Args:
        experts: N stacks of decoder layers.
        states: Input, (B, S, d).
        calls: What is meant for each layer; without a cache.

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
    """Run branches on CUDA streams of their own, the first on the current one; their backward passes follow them.

    Args:
        branches: Stacks of decoder layers.
        states: Input, (B, S, d).
        calls: What is meant for each layer.

    Returns:
        Outputs, (B, S, d), which the current stream waits for.
    """
    here = torch.cuda.current_stream()
    streams = [here, *(stream(number) for number in range(1, len(branches)))]
    outputs = []
    for other in streams[1:]:  # before anything of a branch is on the current stream, which they would wait for
        other.wait_stream(here)
    for layers, other in zip(branches, streams, strict=True):
        with torch.cuda.stream(other):
            outputs.append(run_layers(layers, states, calls))
    for output, other in zip(outputs[1:], streams[1:], strict=True):
        here.wait_stream(other)
        for read in (states, *tensors_in(calls)):
            read.record_stream(other)
        output.record_stream(here)
    return outputs


def tensors_in(calls: Sequence[Call]) -> list[Tensor]:
    """Return the tensors that layers are given besides their input: masks and rotary embeddings."""
    leaves = tree_leaves([(args, options) for args, options in calls])
    return [each for each in leaves if isinstance(each, Tensor)]


@cache
def stream(number: int) -> torch.cuda.Stream:
    """Return a stream, the same one for the same number: memory that was freed on it is free for it again."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def causal_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    """Run the library's attention by torch's own function; where experts are batched, of all of them at once."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if torch.compiler.is_compiling() or not torch._C._functorch.is_batchedtensor(query):
        return sdpa_attention_forward(module, query, key, value, *args, **options)
    dropout = options.get("dropout", 0.0) if module.training else 0.0
    states: Tensor = Folded.apply(query, key, value, dropout, options.get("scaling"))  # type: ignore[no-untyped-call]
    return states.transpose(1, 2).contiguous(), None


class Folded(torch.autograd.Function):
    """Causal attention of batched experts: rows of all experts are rows of one call.

    Torch's rule for batching attention knows neither autocast nor processors. Gradients are those of the one call.
    """

    @staticmethod
    def forward(*given: Any) -> Tensor:
        """Is never called: this exists for `vmap`."""
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Is never called."""

    @staticmethod
    def vmap(
        info: Any, places: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
    ) -> tuple[Tensor, int]:
        """Attend with queries, (N, B, H, S, D), and keys and values, (N, B, K, S, D)."""
        n = info.batch_size
        q, k, v = (
            each.movedim(place, 0).flatten(0, 1) for each, place in zip((query, key, value), places, strict=False)
        )
        states = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        return states.view(n, -1, *states.shape[1:]), 0
