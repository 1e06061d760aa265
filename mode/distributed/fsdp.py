"""A model whose weights, gradients and moments are in shards over all processes: torch's FSDP2.

What trains is a copy in shards. The model that the loop was given is empty during steps and whole at points of the
curve, where it is scored as ever.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mode.backbone.structure import find_decoder_layers
from mode.core import processes
from mode.core.errors import ConfigError
from mode.core.tensors import trainable_parameters
from mode.distributed.layout import DDP
from mode.modular.block import Block, find_blocks
from mode.ops.loss import find_auxiliary_modules


class FSDP(DDP):
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
                f"train.parallelism.strategy={self.layout}: a number alone, such as a temperature, has no shards; "
                "ddp is for all"
            )
        self.whole = model

    def wrap(self, objective: Any, make: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
        """Return what a step runs, in shards, and its optimizer."""
        processes.ensure_initialized()
        device = next(self.whole.parameters()).device
        mesh = init_device_mesh(device.type, (processes.world_size(),))
        for module in find_auxiliary_modules(self.whole):
            module.auxiliary = None  # what a pass before left belongs to that pass, and cannot be copied
        mine = objective.around(copy.deepcopy(self.whole))
        self.distribute(mine, mesh)
        self.model = mine.model
        self.learning = list(trainable_parameters(self.model).values())
        return mine, self.remade(make(self.model))

    def distribute(self, objective: nn.Module, mesh: Any) -> None:
        """Put the weights of every layer, and of all that is outside layers, in shards."""
        for layer in find_decoder_layers(objective):
            fully_shard(layer, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        stop_prefetch(objective)

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
            theirs.data = gather_tensor(mine.data)
        for one, other in zip(find_blocks(self.whole), find_blocks(self.model), strict=True):
            if isinstance(one, Block):
                one.weights = other.weights


def stop_prefetch(model: nn.Module) -> None:
    """Let the last layer that a backward pass goes through not gather the one before it.

    In a modular model's first block no gradient goes through what is frozen, but a layer's backward pass gathers the
    layer that ran before it, needed or not, unless it is told of another: itself, which is gathered already.
    """
    first = {id(module) for block in find_blocks(model)[:1] for module in block.modules()}
    for layer in find_decoder_layers(model):
        if id(layer) not in first or any(each.requires_grad for each in layer.parameters()):
            layer.set_modules_to_backward_prefetch([layer])
            return


def gather_tensor(value: Tensor) -> Tensor:
    """Return a tensor in shards as a whole one of this process's own. For all."""
    return value.full_tensor().clone() if isinstance(value, DTensor) else value
