"""Modular Domain Experts: the paper's equations 1 and 2 on a Hugging Face decoder.

The backbone's L layers fall into B blocks. Block i holds its L/B backbone layers f_bb and N experts f_e^1 ... f_e^N,
each a stack of l ordinary transformer layers. All branches read the block's input x. Their outputs are mixed per token:

    [a_bb, a_e^1 ... a_e^N] = softmax(Linear(x))              (equation 1)
    y = a_bb f_bb(x) + sum_j a_e^j f_e^j(x)                   (equation 2)

With `gate.reads=output` the gate is Linear(f_bb(x)) instead; the branches still read x alone.

Embeddings, positional encoding, final norm and head are the backbone's, shared and frozen.

The decoder still calls L layers, but every layer is replaced by a `BlockSlot`. The slots of a block collect the
arguments that the decoder passes to each layer (masks and rotary embeddings may differ between layers), and the last
slot runs the block. Masks, rotary embeddings, key-value cache and `generate()` are therefore the library's own, for
every family, and every expert layer has its own cache slot.

Shapes: B rows, S tokens per row, d hidden size, N experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mode.gating.gate import Gate
from mode.modular.branches import Call, run_batched, run_layers, run_on_streams
from mode.modular.execution import Execution
from mode.modular.head import HeadBlock
from mode.modular.sparse import add_chosen_branch, can_skip


class Block(nn.Module):
    """A block of backbone layers and its experts (equation 2).

    Attributes:
        backbone: The block's own layers, frozen.
        experts: One stack of layers per expert.
        gate: Computes the branch weights (equation 1).
        execution: How the branches execute; `execute_blocks` and `mode.distributed.mpmd` change it.
        weights: Mean branch weights of the last forward pass, (N + 1,).
        calls: Arguments that the decoder has passed to the block's layers so far in this forward pass.
    """

    def __init__(self, backbone: Sequence[nn.Module], experts: Sequence[Sequence[nn.Module]], gate: Gate) -> None:
        """Assemble the branches and their gate."""
        super().__init__()
        self.backbone = nn.ModuleList(backbone)
        self.experts = nn.ModuleList(nn.ModuleList(layers) for layers in experts)
        self.gate = gate
        self.execution = Execution()
        self.weights: Tensor | None = None
        self.calls: list[Call] = []

    def forward(self, hidden_states: Tensor, calls: Sequence[Call]) -> Tensor:
        """Map a block's input, (B, S, d), to its output, (B, S, d), given the arguments of each of its layers."""
        if self.execution.bypass_experts:
            return run_layers(self.backbone, hidden_states, calls)
        if self.execution.exchange is not None:
            return self.execution.exchange(self, hidden_states, calls)  # type: ignore[no-any-return]
        return self.mix(hidden_states, calls)

    def mix(self, hidden_states: Tensor, calls: Sequence[Call], some: Sequence[int] | None = None) -> Tensor:
        """Return the weighted sum of all branches' outputs, (B, S, d), or of some branches by index."""
        outputs: dict[int, Tensor] = {}
        if self.gate.settings.reads == "output":
            outputs[0] = run_layers(self.backbone, hidden_states, calls)
        weights = self.gate(outputs.get(0, hidden_states), find_cache(calls[0]))
        if self.execution.balanced:
            weights = cycle_branches(weights, self.gate.settings.top_k)
        self.weights = weights.detach().mean(dim=(0, 1))
        branches = [self.backbone, *self.experts]
        outputs |= self.run_concurrently(branches, hidden_states, calls, len(outputs))
        chosen = None
        if len(outputs) < len(branches):
            chosen = self.count_chosen(weights, cached=find_cache(calls[0]) is not None)
        mixed: Tensor = torch.zeros((), device=hidden_states.device)
        for index, layers in enumerate(branches):
            if some is not None and index not in some:
                continue
            weight = weights[..., index : index + 1]
            if chosen is not None and index not in outputs and can_skip(layers, calls):
                mixed = mixed if mixed.ndim else torch.zeros_like(hidden_states)
                mixed = add_chosen_branch(mixed, layers, hidden_states, calls, weight, chosen[index])
            else:
                output = outputs[index] if index in outputs else run_layers(layers, hidden_states, calls)
                mixed = mixed + weight.to(output.dtype) * output
        return mixed

    def count_chosen(self, weights: Tensor, *, cached: bool) -> list[list[int]] | None:
        """Return how many tokens of every row choose every branch, by branch; None where no token may be skipped.

        The counts are read from the device, which a CUDA graph cannot do. A key-value cache needs all tokens.
        """
        settings = self.gate.settings
        chooses = settings.top_k is not None or settings.top_p is not None
        if not chooses or cached or not self.execution.skip_unchosen or torch.compiler.is_compiling():
            return None
        counts: list[list[int]] = (weights != 0).sum(1).T.tolist()  # not "> 0": a NaN weight must not be skipped
        return counts

    def run_concurrently(
        self, branches: Sequence[Any], states: Tensor, calls: Sequence[Call], done: int
    ) -> dict[int, Tensor]:
        """Return the outputs of batched branches or of branches on streams, by index; empty where all run in a loop.

        Args:
            branches: All branches.
            states: The block's input, (B, S, d).
            calls: Arguments of each layer.
            done: Branches, from the first, that have been run.
        """
        execution = self.execution
        if execution.branches == "loop" or execution.exchange is not None or find_cache(calls[0]) is not None:
            return {}
        if execution.branches == "streams":
            return dict(enumerate(run_on_streams(branches[done:], states, calls), done))
        return dict(enumerate(run_batched(branches[1:], states, calls), 1)) if len(branches) > 2 else {}


class BlockSlot(nn.Module):
    """Replaces a layer of the decoder: collects the layer's arguments and, at the last slot, runs the block."""

    def __init__(self, block: Block, position: int) -> None:
        """Replace the block's layer at `position`."""
        super().__init__()
        self.position = position
        self.block = (block,)  # in a tuple, so that the block is not registered as a submodule here

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return the input, (B, S, d), unchanged up to the last slot, which returns the block's output, (B, S, d)."""
        (block,) = self.block
        if self.position == 0:
            block.calls.clear()
        block.calls.append((args, options))
        if len(block.calls) < len(block.backbone):
            return hidden_states
        calls = list(block.calls)
        block.calls.clear()  # frees masks and cache after the forward pass
        output: Tensor = block(hidden_states, calls)
        return output


def find_cache(call: Call) -> Any:
    """Return the key-value cache among a layer's arguments, by whatever name, or None."""
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
    """Return the blocks of a modular model, in order; the head's block, if any, is last."""
    modules = list(model.modules())
    heads = [module for module in modules if isinstance(module, HeadBlock)]
    return [*(module for module in modules if isinstance(module, Block)), *heads]


@contextmanager
def execute_blocks(blocks: Sequence[Block | HeadBlock], **changes: Any) -> Iterator[None]:
    """Change the execution of blocks, and restore it afterwards.

    Args:
        blocks: Blocks of a model, as `find_blocks` returns them.
        changes: Fields of `Execution`.
    """
    before = [(block, block.execution) for block in blocks]
    for block, execution in before:
        block.execution = replace(execution, **changes)
    try:
        yield
    finally:
        for block, execution in before:
            block.execution = execution


@contextmanager
def bypass_experts(model: nn.Module) -> Iterator[None]:
    """Make a modular model compute what its backbone computes, without gradients."""
    with torch.no_grad(), execute_blocks(find_blocks(model), bypass_experts=True):
        yield


def cycle_branches(weights: Tensor, top_k: int | None) -> Tensor:
    """Return weights with which every token chooses `top_k` branches in turn, (B, S, N + 1); all branches without k."""
    _, length, branches = weights.shape
    turns = torch.arange(length, device=weights.device)[:, None] + torch.arange(branches, device=weights.device)
    return torch.where(turns % branches < (top_k or branches), weights + 1.0, 0.0)
