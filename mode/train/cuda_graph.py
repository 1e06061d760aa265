"""Forward and backward of a step as one CUDA graph: captured once, then replayed with the rows of every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mode.core import processes
from mode.core.errors import ConfigError
from mode.modular.block import Block
from mode.train.step_batch import StepBatch

if TYPE_CHECKING:
    from mode.config.train import Train

ForwardBackward = Callable[..., tuple[Tensor, Tensor]]
"""Runs forward and backward over the rows of a step: `mode.train.loop.forward_backward`."""


WARM_UP = 2
"""Steps before the capture, in which libraries allocate what they cannot allocate during a capture."""


def capture_step(
    forward_backward: ForwardBackward, parameters: Sequence[nn.Parameter], settings: Train, *, anchored: bool
) -> ForwardBackward:
    """Return forward and backward of a step as they are, or as one CUDA graph where the settings ask for a graph.

    Args:
        forward_backward: Runs forward and backward over the rows of a step.
        parameters: The parameters that train.
        settings: Settings of the loop.
        anchored: Whether the objective has an anchor term.

    Raises:
        ConfigError: A graph is asked for without a CUDA device, with an anchor or with several processes.
    """
    if not settings.kernels.cuda_graph:
        return forward_backward
    check_cuda(parameters[0].device)
    if anchored:
        raise ConfigError(
            "train.kernels.cuda_graph=true: which rows are anchored differs from step to step; leave it off"
        )
    if processes.world_size() > 1:
        raise ConfigError("train.kernels.cuda_graph=true goes with one process; leave it off")
    return StepGraph(forward_backward, parameters)


def check_cuda(device: torch.device) -> None:
    """Check that a device supports CUDA graphs.

    Raises:
        ConfigError: It is no CUDA device.
    """
    if device.type != "cuda":
        raise ConfigError("train.kernels.cuda_graph=true needs a CUDA device; leave it off here")


class StepGraph:
    """Forward and backward of a step, captured after the warm-up; the rows of all steps have one shape."""

    def __init__(self, forward_backward: ForwardBackward, parameters: Sequence[nn.Parameter]) -> None:
        """Capture nothing yet.

        Args:
            forward_backward: Runs forward and backward over the rows of a step.
            parameters: The parameters that train. Every replay writes their gradients to the same memory.
        """
        self.forward_backward, self.parameters = forward_backward, parameters
        self.steps = 0
        self.graph: Any = None
        self.inputs: StepBatch
        self.outputs: tuple[Tensor, Tensor]
        self.gradients: list[Tensor | None] = []
        self.gate_means: list[tuple[Block, Tensor]] = []

    def __call__(
        self, objective: nn.Module, batch: StepBatch, micro_batches: int, slots: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward of a step, as `mode.train.loop.forward_backward` does.

        Returns:
            The loss and the last micro-batch's hidden states, (B / micro_batches, S, d), valid until the next step.

        Raises:
            ConfigError: An operation of the model waits for the device, so that the step cannot be captured.
        """
        if self.steps < WARM_UP:
            self.steps += 1
            return self.run_on_side_stream(objective, batch, micro_batches, slots)
        if self.graph is None:
            self.capture(objective, batch, micro_batches, slots)
        self.inputs.tokens.copy_(batch.tokens)
        if self.inputs.row_kinds is not None and batch.row_kinds is not None:
            self.inputs.row_kinds.copy_(batch.row_kinds)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        for block, weights in self.gate_means:  # scoring between two steps has replaced them
            block.weights = weights
        return self.outputs

    def run_on_side_stream(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Run forward and backward on a side stream, as a capture does."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            outputs = self.forward_backward(*arguments)
        current.wait_stream(side)
        return outputs

    def capture(self, objective: nn.Module, batch: StepBatch, micro_batches: int, slots: int) -> None:
        """Capture forward and backward; nothing is computed."""
        self.inputs = batch.map(torch.clone)
        for parameter in self.parameters:
            parameter.grad = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.outputs = self.forward_backward(objective, self.inputs, micro_batches, slots)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"train.kernels.cuda_graph=true: this model's step cannot be captured ({reason}); leave it off"
            ) from error
        self.gradients = [parameter.grad for parameter in self.parameters]
        blocks = [module for module in objective.modules() if isinstance(module, Block)]
        self.gate_means = [(block, block.weights) for block in blocks if isinstance(block.weights, Tensor)]
        self.graph = graph
