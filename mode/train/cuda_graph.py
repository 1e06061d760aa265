"""The passes of a step as one CUDA graph: recorded once, and replayed with other rows, without a launch of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mode.core import processes
from mode.core.errors import ConfigError

if TYPE_CHECKING:
    from mode.config.train import Train

Passes = Callable[..., tuple[Tensor, Tensor]]
"""Runs forward and backward over the rows of a step: `mode.train.loop.accumulate`."""


WARM_UP = 2
"""Steps before it is recorded, in which libraries make what cannot be made while recording."""


def record_passes(passes: Passes, weights: Sequence[nn.Parameter], settings: Train, *, held: bool) -> Passes:
    """Return the passes of a step as they are, or as one CUDA graph where the settings ask for that.

    Args:
        passes: Runs forward and backward over the rows of a step.
        weights: What trains.
        settings: The loop's.
        held: Whether the model is held to its backbone on some rows.

    Raises:
        ConfigError: A graph is asked for where there can be none.
    """
    if not settings.kernels.cuda_graph:
        return passes
    check_cuda(weights[0].device)
    if held:
        raise ConfigError(
            "train.kernels.cuda_graph=true: which rows are held to the backbone differs from step to step; leave it off"
        )
    if processes.world_size() > 1:
        raise ConfigError("train.kernels.cuda_graph=true goes with one process; leave it off")
    return Graph(passes, weights)


def check_cuda(device: torch.device) -> None:
    """Refuse a graph on a device that has none.

    Raises:
        ConfigError: It is not of CUDA.
    """
    if device.type != "cuda":
        raise ConfigError("train.kernels.cuda_graph=true needs a CUDA device; leave it off here")


class Graph:
    """Passes of a step that are recorded when they have been run a few times; all steps have rows of one shape."""

    def __init__(self, passes: Passes, weights: Sequence[nn.Parameter]) -> None:
        """Take what to record.

        Args:
            passes: Runs forward and backward over the rows of a step.
            weights: What trains: replaying writes their gradients to the same places every time.
        """
        self.passes, self.weights = passes, weights
        self.seen = 0
        self.graph: Any = None
        self.given: list[Tensor | None] = []
        self.gradients: list[Tensor | None] = []
        self.told: list[tuple[Any, Tensor]] = []
        self.out: tuple[Tensor, Tensor]

    def __call__(
        self,
        objective: nn.Module,
        rows: Tensor,
        parts: int,
        held: Tensor | None = None,
        kinds: Tensor | None = None,
        slots: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Run the passes of a step, as `mode.train.loop.accumulate` does.

        Returns:
            The loss and the last micro-batch's hidden states, (B / parts, S, d), which hold until the next step.

        Raises:
            ConfigError: Something in the model waits for the device, so that it cannot be recorded.
        """
        if self.seen < WARM_UP:
            self.seen += 1
            return self.beside(objective, rows, parts, held, kinds, slots)
        if self.graph is None:
            self.record(objective, rows, parts, kinds, slots)
        for place, value in zip(self.given, (rows, kinds), strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        self.graph.replay()
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient
        for block, weights in self.told:  # else scoring in between would leave its own
            block.weights = weights
        return self.out

    def beside(self, *given: Any) -> tuple[Tensor, Tensor]:
        """Run the passes on a stream of their own, as they will be recorded."""
        here, other = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        other.wait_stream(here)
        with torch.cuda.stream(other):
            out = self.passes(*given)
        here.wait_stream(other)
        return out

    def record(self, objective: nn.Module, rows: Tensor, parts: int, kinds: Tensor | None, slots: int) -> None:
        """Record the passes; nothing is computed."""
        self.given = [None if value is None else value.clone() for value in (rows, kinds)]
        for weight in self.weights:
            weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.out = self.passes(objective, self.given[0], parts, None, self.given[1], slots)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"train.kernels.cuda_graph=true: this model's step cannot be recorded ({reason}); leave it off"
            ) from error
        self.gradients = [weight.grad for weight in self.weights]
        blocks = [module for module in objective.modules() if hasattr(module, "beside")]
        self.told = [(block, block.weights) for block in blocks if isinstance(block.weights, Tensor)]
        self.graph = graph
