"""Tensor parallelism: every matrix of a layer is split over all processes, by the plan of `transformers`.

A family's plan says for every matrix of a layer whether it is split by rows or by columns; torch's DTensor does the
rest: products whose results are parts, or sums of parts. Every process has all rows of a step, and all weights outside
the layers. A split copy of the model trains, as with FSDP (`mode.distributed.fsdp`).
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
"""Torch's parallel style for each name in a plan."""


SUMMED = "replicated_with_grad_allreduce"
"""A plan's name for a module that every process has whole but applies to a part of the heads: gradients are summed."""


class TensorParallel(FSDP):
    """A model whose matrices are split over all processes, each with all rows."""

    layout = "tp"

    def __init__(self, model: Any) -> None:
        """Take a model.

        Raises:
            ConfigError: The family has no plan, the plan does not fit the layers, or the heads do not divide.
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

    def select_rows(self, values: Tensor) -> Tensor:
        """Return all rows of a step."""
        return values

    def derive_seed(self, seed: int) -> int:
        """Return the seed, the same in all processes."""
        return seed

    def distribute(self, objective: nn.Module, mesh: Any) -> None:
        """Split the matrices of all layers."""
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

    def split_groups(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer with split and whole weights in separate groups: one fused kernel updates a group."""
        optimizer.param_groups[:] = [
            group | {"params": some}
            for group in optimizer.param_groups
            for split in (True, False)
            if (some := [each for each in group["params"] if isinstance(each, DTensor) is split])
        ]
        return optimizer

    def clip_gradients(self, max_norm: float) -> None:
        """Sum the partial gradients, and scale all gradients so that their global norm is at most `max_norm`."""
        for parameter in self.summed:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
        found = [each for each in self.trained if each.grad is not None]
        norms = []
        for split in (True, False):
            grads = [each.grad for each in found if each.grad is not None and isinstance(each, DTensor) is split]
            norms += [gather_scalar(torch.nn.utils.get_total_norm(grads))] if grads else []
        total = torch.stack(norms).norm()
        for split in (True, False):
            some = [each for each in found if isinstance(each, DTensor) is split]
            torch.nn.utils.clip_grads_with_norm_(some, max_norm, total)


def gather_scalar(value: Tensor) -> Tensor:
    """Return a scalar as a full tensor. Collective where it is distributed."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def find_plan(model: Any) -> dict[str, str]:
    """Return a family's plan for a layer: for every module, by its path in the layer, how it is split.

    Raises:
        ConfigError: `transformers` has no plan for the family.
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
    """Check that a plan fits a layer.

    Args:
        layer: A decoder layer.
        plan: How every module is split.
        family: The family of the plan.
        count: Number of processes.

    Raises:
        ConfigError: A matrix belongs to no linear layer, is missing in the plan or does not divide, or a style of the
            plan is unknown.
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
