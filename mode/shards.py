"""A model whose weights, gradients and moments are in shards over all processes: torch's FSDP2.

What trains is a copy in shards. The model that the loop was given is empty during steps and whole at points of the
curve, where it is scored as ever.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mode import parallel
from mode.checked import ConfigError
from mode.layers import decoder_layers
from mode.loss import with_auxiliary
from mode.modular import Block, blocks_of
from mode.objective import Objective
from mode.spread import Copies
from mode.tensors import trainable


class Shards(Copies):
    """A model in shards over all processes, each with its part of the rows."""

    halves = False
    layout = "fsdp"

    def __init__(self, model: nn.Module) -> None:
        """Take a model.

        Raises:
            ConfigError: One of its weights is a number alone.
        """
        super().__init__(model)
        if any(parameter.ndim == 0 for parameter in model.parameters()):
            raise ConfigError(
                f"train.layout={self.layout}: a number alone, such as a temperature, has no shards; ddp is for all"
            )
        self.whole = model

    def wrap(self, objective: Objective, make: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
        """Return what a step runs, in shards, and its optimizer."""
        parallel.meet()
        device = next(self.whole.parameters()).device
        mesh = init_device_mesh(device.type, (parallel.size(),))
        for module in with_auxiliary(self.whole):
            module.auxiliary = None  # what a pass before left belongs to that pass, and cannot be copied
        hold = objective.hold and replace(objective.hold, always=True)  # its layers are gathered by all
        mine = Objective(copy.deepcopy(self.whole), objective.settings, hold, end=objective.end)
        self.distribute(mine, mesh)
        self.model = mine.model
        self.learning = list(trainable(self.model).values())
        return mine, self.remade(make(self.model))

    def distribute(self, objective: Objective, mesh: Any) -> None:
        """Put the weights of every layer, and of all that is outside layers, in shards."""
        for layer in decoder_layers(objective):
            fully_shard(layer, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        end_of_backward(objective)

    def remade(self, optimizer: Any) -> Any:
        """Return an optimizer of what is in shards, as it is."""
        return optimizer

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Empty the whole model for a step."""
        for parameter in self.whole.parameters():
            parameter.data = torch.empty(0, device=parameter.device)
        yield

    def collect(self, due: bool) -> None:
        """Make the model whole, on every process. For all."""
        for mine, theirs in zip(self.model.parameters(), self.whole.parameters(), strict=True):
            theirs.data = gathered(mine.data)
        for one, other in zip(blocks_of(self.whole), blocks_of(self.model), strict=True):
            if isinstance(one, Block):
                one.weights = other.weights


def end_of_backward(model: nn.Module) -> None:
    """Let the last layer that a backward pass goes through not gather the one before it.

    In a modular model's first block no gradient goes through what is frozen, but a layer's backward pass gathers the
    layer that ran before it, needed or not, unless it is told of another: itself, which is gathered already.
    """
    first = {id(module) for block in blocks_of(model)[:1] for module in block.modules()}
    for layer in decoder_layers(model):
        if id(layer) not in first or any(each.requires_grad for each in layer.parameters()):
            layer.set_modules_to_backward_prefetch([layer])
            return


def gathered(value: Tensor) -> Tensor:
    """Return a tensor in shards as a whole one of this process's own. For all."""
    return value.full_tensor().clone() if isinstance(value, DTensor) else value
