"""A model whose weights, gradients and optimizer state are sharded over all processes, by torch's FSDP2.

A sharded copy of the model trains. The weights of the original are freed during steps and gathered at points of the
curve, where the original is scored.
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
from mode.core.tensors import list_trainable
from mode.distributed.layout import DDP
from mode.modular.block import Block, find_blocks
from mode.ops.loss import find_auxiliary_modules


class FSDP(DDP):
    """A model sharded over all processes, each with its part of the rows."""

    supports_bf16_weights = False
    layout = "fsdp"

    def __init__(self, model: nn.Module) -> None:
        """Take a model.

        Raises:
            ConfigError: One of its parameters is a scalar.
        """
        super().__init__(model)
        if any(parameter.ndim == 0 for parameter in model.parameters()):
            raise ConfigError(
                f"train.parallelism.strategy={self.layout}: a scalar parameter, such as a temperature, cannot be "
                "sharded; ddp goes with every model"
            )
        self.whole = model

    def wrap(self, objective: Any, make_optimizer: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
        """Return the objective of the sharded copy, and its optimizer."""
        processes.ensure_initialized()
        device = next(self.whole.parameters()).device
        mesh = init_device_mesh(device.type, (processes.world_size(),))
        for module in find_auxiliary_modules(self.whole):
            module.auxiliary = None  # it belongs to the graph of an earlier forward pass, which cannot be copied
        sharded = objective.around(copy.deepcopy(self.whole))
        self.distribute(sharded, mesh)
        self.model = sharded.model
        self.trained = list(list_trainable(self.model).values())
        return sharded, self.split_groups(make_optimizer(self.model))

    def distribute(self, objective: nn.Module, mesh: Any) -> None:
        """Shard the weights of every layer, and those outside the layers."""
        for layer in find_decoder_layers(objective):
            fully_shard(layer, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        stop_prefetch(objective)

    def split_groups(self, optimizer: Any) -> Any:
        """Return the optimizer as it is: all weights are sharded, so its parameter groups are uniform."""
        return optimizer

    @contextmanager
    def enter_step(self) -> Iterator[None]:
        """Free the weights of the original for a step."""
        for parameter in self.whole.parameters():
            parameter.data = torch.empty(0, device=parameter.device)
        yield

    def gather_weights(self, due: bool) -> None:
        """Gather the weights of the original in every process. Collective: all processes must call it."""
        for sharded, whole in zip(self.model.parameters(), self.whole.parameters(), strict=True):
            whole.data = gather_tensor(sharded.data)
        for original, copied in zip(find_blocks(self.whole), find_blocks(self.model), strict=True):
            if isinstance(original, Block):
                original.weights = copied.weights


def stop_prefetch(model: nn.Module) -> None:
    """Stop the last layer of the backward pass from prefetching the layer before it.

    No gradient flows through the frozen layers of a modular model's first block. A layer's backward pass prefetches the
    layer that ran before it, needed or not, unless another layer is set: itself, which is gathered already.
    """
    first = {id(module) for block in find_blocks(model)[:1] for module in block.modules()}
    for layer in find_decoder_layers(model):
        if id(layer) not in first or any(each.requires_grad for each in layer.parameters()):
            layer.set_modules_to_backward_prefetch([layer])
            return


def gather_tensor(value: Tensor) -> Tensor:
    """Return a sharded tensor as a full tensor of this process. Collective: all processes must call it."""
    return value.full_tensor().clone() if isinstance(value, DTensor) else value
