"""A model each of whose matrices is in slices over all processes: tensor parallelism, by `transformers`' own plan.

A family's plan says of every matrix of a layer whether its rows or its columns are dealt out; torch's DTensor does the
rest: products whose results are parts, or sums of parts. Every process has all rows of a step, and all of what is
outside the layers. What trains is a copy in slices, as with shards (`mode.distributed.fsdp`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from mode.backbone.structure import find_decoder_layers
from mode.core import processes
from mode.core.errors import ConfigError
from mode.distributed.fsdp import FSDP

STYLES: dict[str, type[ParallelStyle] | Any] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
}
"""Torch's style for each of the library's names."""


SUMMED = "replicated_with_grad_allreduce"
"""The library's name for what every process has whole, while it sees a part of what reads it."""


class TensorParallel(FSDP):
    """A model in slices over all processes, each with all rows."""

    layout = "tp"

    def __init__(self, model: Any) -> None:
        """Take a model.

        Raises:
            ConfigError: Its family has no plan, the plan does not fit its layers, or its heads do not divide.
        """
        super().__init__(model)
        self.plan = find_plan(model)
        config = model.config.get_text_config()
        for name in ("num_attention_heads", "num_key_value_heads"):
            if (count := getattr(config, name, None)) and count % processes.world_size():
                size = processes.world_size()
                raise ConfigError(
                    f"train.parallelism.strategy=tp: {name}={count} does not divide over {size} processes"
                )
        for layer in find_decoder_layers(model):
            check_layer(layer, self.plan, config.model_type, processes.world_size())

    def rows(self, values: Any) -> Any:
        """Return all rows of a step."""
        return values

    def seed(self, seed: int) -> int:
        """Return a seed that is the same for all."""
        return seed

    def distribute(self, objective: nn.Module, mesh: Any) -> None:
        """Put the matrices of all layers in slices."""
        for layer in find_decoder_layers(objective):
            parallelize_module(
                layer, mesh, {path: STYLES[kind]() for path, kind in self.plan.items() if kind != SUMMED}
            )
        self.summed = [
            parameter
            for layer in find_decoder_layers(objective)
            for path, kind in self.plan.items()
            if kind == SUMMED
            for parameter in layer.get_submodule(path).parameters()
            if parameter.requires_grad
        ]

    def remade(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return an optimizer in whose groups no slices are beside whole weights: one operation updates a group."""
        optimizer.param_groups[:] = [
            group | {"params": some}
            for group in optimizer.param_groups
            for sliced in (True, False)
            if (some := [each for each in group["params"] if isinstance(each, DTensor) is sliced])
        ]
        return optimizer

    def clip(self, most: float) -> None:
        """Sum what gradients are parts, and scale all so that their norm is `most` at most."""
        for parameter in self.summed:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
        found = [each for each in self.learning if each.grad is not None]
        norms = []
        for sliced in (True, False):
            grads = [each.grad for each in found if each.grad is not None and isinstance(each, DTensor) is sliced]
            norms += [gather_number(torch.nn.utils.get_total_norm(grads))] if grads else []
        total = torch.stack(norms).norm()
        for sliced in (True, False):
            some = [each for each in found if isinstance(each, DTensor) is sliced]
            torch.nn.utils.clip_grads_with_norm_(some, most, total)


def gather_number(value: Tensor) -> Tensor:
    """Return a number that is in parts as one."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def find_plan(model: Any) -> dict[str, str]:
    """Return a family's plan for a layer: of modules, by their paths within it, how they are dealt out.

    Raises:
        ConfigError: `transformers` has none.
    """
    config = model.config.get_text_config()
    found = {
        path.partition(".*.")[2]: str(kind)
        for path, kind in (getattr(config, "base_model_tp_plan", None) or {}).items()
        if ".*." in path
    }
    if not found:
        raise ConfigError(
            f"train.parallelism.strategy=tp: transformers has no plan for {config.model_type}; "
            "fsdp goes with every family"
        )
    return found


def check_layer(layer: nn.Module, plan: dict[str, str], family: str, count: int) -> None:
    """Refuse a layer that a plan does not fit.

    Args:
        layer: A decoder layer.
        plan: Of every module, how it is dealt out.
        family: What has the plan.
        count: Number of processes.

    Raises:
        ConfigError: A matrix is no linear map any more, or in none of the plan's modules, or does not divide; or a
            style is not known.
    """
    for path, kind in plan.items():
        if kind not in (*STYLES, SUMMED):
            raise ConfigError(f"train.parallelism.strategy=tp: {family} has {path} as {kind}, which is not known here")
    matrices = {name.removesuffix(".weight"): each for name, each in layer.named_parameters() if each.ndim > 1}
    for path, matrix in matrices.items():
        if path not in plan or type(layer.get_submodule(path)) is not nn.Linear:
            raise ConfigError(
                f"train.parallelism.strategy=tp: the plan of {family} does not know {path}, "
                "which this method adds or changes"
            )
        size = matrix.shape[0 if plan[path].startswith("colwise") else 1]
        if size % count:
            raise ConfigError(
                f"train.parallelism.strategy=tp: {path} has {size}, which does not divide over {count} processes"
            )
