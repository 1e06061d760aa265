"""Modular Domain Experts: the paper's equations 1 and 2 on a Hugging Face decoder.

The backbone's L layers fall into B blocks. Block i holds its L/B backbone layers f_bb and N experts f_e^1 ... f_e^N,
each a stack of l ordinary transformer layers. All read the block's input x and their outputs are mixed per token:

    [a_bb, a_e^1 ... a_e^N] = softmax(Linear(x))              (equation 1)
    y = a_bb f_bb(x) + sum_j a_e^j f_e^j(x)                   (equation 2)

With `gate.reads=output` the gate is Linear(f_bb(x)) instead: the branches still need nothing but x.

Embeddings, positional encoding, final norm and head are the backbone's, shared and frozen.

The decoder still calls L layers, but finds a `BlockSlot` in the place of each. The slots of a block collect what the
decoder passes to each of its layers (masks and rotary embeddings may differ between them), and the last slot runs the
block. Masks, rotary embeddings, key-value cache and `generate()` are therefore the library's own, for every family, and
every expert layer has a cache slot of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mode.gating.gate import Gate
from mode.modular.branches import Call, run_batched, run_layers, run_on_streams
from mode.modular.head import HeadBlock
from mode.modular.sparse import add_kept_branch, can_skip


class Block(nn.Module):
    """A block of backbone layers and the experts beside it (equation 2).

    Attributes:
        backbone: The block's own layers, frozen.
        experts: One stack of layers per expert.
        gate: Weights of the branches.
        weights: Mean branch weights of the last forward pass, (N + 1,).
        calls: What the decoder gave to the block's layers so far in this pass.
        alone: Whether the experts are left out, so that the block is the backbone's.
        spread: How the branches are spread over processes (`mode.distributed.mpmd`); None where all run here.
        beside: How its branches run: in a `loop`, experts `batched`, or on `streams` (`mode.modular.branches`).
        skips: Whether branches may leave out tokens that do not keep them (`mode.modular.sparse`).
        even: Whether branches are kept in turn, each by as many tokens, whatever the gate says.
    """

    def __init__(self, backbone: Sequence[nn.Module], experts: Sequence[Sequence[nn.Module]], gate: Gate) -> None:
        """Put the branches side by side."""
        super().__init__()
        self.backbone = nn.ModuleList(backbone)
        self.experts = nn.ModuleList(nn.ModuleList(layers) for layers in experts)
        self.gate = gate
        self.weights: Tensor | None = None
        self.calls: list[Call] = []
        self.alone = False
        self.spread: Any = None
        self.beside = "loop"
        self.skips = True
        self.even = False

    def forward(self, hidden_states: Tensor, calls: Sequence[Call]) -> Tensor:
        """Map a block's input, (B, S, d), to its output, (B, S, d), with what is meant for each of its layers."""
        if self.alone:
            return run_layers(self.backbone, hidden_states, calls)
        if self.spread is not None:
            return self.spread(self, hidden_states, calls)  # type: ignore[no-any-return]
        return self.mix(hidden_states, calls)

    def mix(self, hidden_states: Tensor, calls: Sequence[Call], some: Sequence[int] | None = None) -> Tensor:
        """Return the branches' outputs, weighted and summed, (B, S, d): of all, or of some by number."""
        outputs: dict[int, Tensor] = {}
        if self.gate.settings.reads == "output":
            outputs[0] = run_layers(self.backbone, hidden_states, calls)
        weights = self.gate(outputs.get(0, hidden_states), find_cache(calls[0]))
        if self.even:
            weights = cycle_branches(weights, self.gate.settings.top_k)
        self.weights = weights.detach().mean(dim=(0, 1))
        branches = [self.backbone, *self.experts]
        outputs |= self.together(branches, hidden_states, calls, len(outputs))
        kept = None
        if len(outputs) < len(branches):
            kept = self.kept(weights, cached=find_cache(calls[0]) is not None)
        mixed: Tensor = torch.zeros((), device=hidden_states.device)
        for index, layers in enumerate(branches):
            if some is not None and index not in some:
                continue
            weight = weights[..., index : index + 1]
            if kept is not None and index not in outputs and can_skip(layers, calls):
                mixed = mixed if mixed.ndim else torch.zeros_like(hidden_states)
                mixed = add_kept_branch(mixed, layers, hidden_states, calls, weight, kept[index])
            else:
                output = outputs[index] if index in outputs else run_layers(layers, hidden_states, calls)
                mixed = mixed + weight.to(output.dtype) * output
        return mixed

    def kept(self, weights: Tensor, *, cached: bool) -> list[list[int]] | None:
        """Return how many tokens of every row keep every branch, by branch; None where no token may be left out.

        To ask waits for the device, which a graph cannot; and what is cached is of all tokens.
        """
        settings = self.gate.settings
        chooses = settings.top_k is not None or settings.top_p is not None
        if not chooses or cached or not self.skips or torch.compiler.is_compiling():
            return None
        found: list[list[int]] = (weights != 0).sum(1).T.tolist()  # not "> 0": what is no number is not left out
        return found

    def together(self, branches: Sequence[Any], states: Tensor, calls: Sequence[Call], done: int) -> dict[int, Tensor]:
        """Return the outputs of branches that run beside each other, by number; none where all run in a loop.

        Args:
            branches: All branches.
            states: The block's input, (B, S, d).
            calls: What is meant for each layer.
            done: Branches, from the first, that have been run.
        """
        if self.beside == "loop" or self.spread is not None or find_cache(calls[0]) is not None:
            return {}
        if self.beside == "streams":
            return dict(enumerate(run_on_streams(branches[done:], states, calls), done))
        return dict(enumerate(run_batched(branches[1:], states, calls), 1)) if len(branches) > 2 else {}


class BlockSlot(nn.Module):
    """A layer's place in the decoder: gathers the call and, at the last place of a block, runs the block."""

    def __init__(self, block: Block, position: int) -> None:
        """Stand for the block's layer at `position`."""
        super().__init__()
        self.position = position
        self.block = (block,)  # inside a tuple the block is not a part of this module: its weights belong elsewhere

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        """Pass the block's input, (B, S, d), on to its last turn, which returns the block's output, (B, S, d)."""
        (block,) = self.block
        if self.position == 0:
            block.calls.clear()
        block.calls.append((args, options))
        if len(block.calls) < len(block.backbone):
            return hidden_states
        calls = list(block.calls)
        block.calls.clear()  # else masks and cache would live on after the pass
        output: Tensor = block(hidden_states, calls)
        return output


def find_cache(call: Call) -> Any:
    """Return the key-value cache that a layer is given, by whatever name, or None."""
    from transformers import Cache

    args, options = call
    return next((value for value in (*args, *options.values()) if isinstance(value, Cache)), None)


def read_gate_means(model: nn.Module) -> dict[str, float]:
    """Return the mean weight of every branch in the last forward pass, by block; branch 0 is the backbone."""
    return {
        f"gate/block{number}/branch{branch}": float(weight)
        for number, block in enumerate(find_blocks(model))
        if block.weights is not None
        for branch, weight in enumerate(block.weights)
    }


def find_blocks(model: nn.Module) -> list[Block | HeadBlock]:
    """Return the blocks of a modular model, in order; that of its head is the last, if it has one."""
    modules = list(model.modules())
    heads = [module for module in modules if isinstance(module, HeadBlock)]
    return [*(module for module in modules if isinstance(module, Block)), *heads]


@contextmanager
def bypass_experts(model: nn.Module) -> Iterator[None]:
    """Let a modular model be its backbone for a while, without gradients."""
    found = find_blocks(model)
    for block in found:
        block.alone = True
    try:
        with torch.no_grad():
            yield
    finally:
        for block in found:
            block.alone = False


@contextmanager
def force_even_load(model: nn.Module) -> Iterator[None]:
    """Let a modular model's gates that keep `top_k` branches keep each for as many tokens: what costs are told of."""
    found = [block for block in find_blocks(model) if isinstance(block, Block)]
    for block in found:
        block.even = True
    try:
        yield
    finally:
        for block in found:
            block.even = False


def cycle_branches(weights: Tensor, top_k: int | None) -> Tensor:
    """Return weights of which every token keeps the branches that it is its turn to, (B, S, N + 1); all without k."""
    _, length, branches = weights.shape
    turns = torch.arange(length, device=weights.device)[:, None] + torch.arange(branches, device=weights.device)
    return torch.where(turns % branches < (top_k or branches), weights + 1.0, 0.0)
