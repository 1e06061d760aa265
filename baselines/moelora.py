"""MOELoRA (Liu et al., 2023): the rank of a LoRA is split over experts that a row's task weighs.

At every adapted layer y = W0 x + (alpha / r) sum_i w_i(task) B_i A_i x, each expert of rank r / N, with w = softmax(W e
+ b) and e the task's embedding. So for one task the experts fold into one adapter. A is normal with standard deviation
0.01 and B = 0 at the start.

Every source of the mix is a task. `task=told`: who scores a text says which domain it is from, as published; a domain
without a task weighs all tasks alike. `task=guessed`: a linear classifier reads the mean embedding of the text so far
and weighs the tasks token by token, which is this project's. The tasks' embeddings are the same for all layers. The
published dropout of 0.1 is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from mode.backbone.shape import Flops, read_shape
from mode.config.base import STRICT
from mode.config.run import Run
from mode.cost.adapters import bank_cost
from mode.cost.flops import Cost
from mode.methods.base import Material
from mode.methods.sizing import LowRank

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class MOELoRA(LowRank):
    """Low-rank experts weighed by the task.

    Attributes:
        num_experts: N.
        task: How a task is known after training.
    """

    recorded_as: ClassVar[str] = "baselines.moelora.MOELoRA"
    weighs_experts: ClassVar[bool] = True
    identical_at_start: ClassVar[bool] = True

    num_experts: Annotated[int, Field(gt=0)]
    task: Literal["told", "guessed"]

    def __post_init__(self) -> None:
        if self.rank % self.num_experts:
            raise ValueError(f"rank={self.rank} does not divide over num_experts={self.num_experts}")

    @property
    def least(self) -> int:
        """Return the least rank, of which others are multiples: every expert has the same."""
        return self.num_experts

    def row_kinds(self, run: Run) -> Mapping[str, int]:
        """Return the task of every source's rows."""
        return {name: number for number, name in enumerate(self.mixture(run))}

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with experts at all linear layers of its decoder layers; all that is new trains."""
        import torch

        from mode.moe.low_rank import LowRankBank, replace_linears
        from mode.moe.task_router import TaskRouter, Tasks, insert_tasks

        model = material.backbone()
        model.requires_grad_(False)
        torch.manual_seed(run.seed)
        each = self.sized(run).rank // self.num_experts
        hidden = model.config.get_text_config().hidden_size
        tasks = Tasks(len(self.row_kinds(run)), hidden, guessed=self.task == "guessed")

        def make(path: str, base: nn.Module) -> nn.Module:
            router = TaskRouter(tasks, self.num_experts)
            bank = LowRankBank(base, self.num_experts, each, self.scale, router)
            torch.nn.init.normal_(bank.down, std=0.01)
            return bank

        replace_linears(model, "all", make)
        insert_tasks(model, tasks)
        adapted: nn.Module = model
        return adapted

    def cost(self, run: Run) -> Cost:
        """Return what experts take beside a frozen backbone; their gates, a row's alone, take next to nothing."""
        from mode.moe.task_router import WIDTH

        shape, length, tasks = read_shape(run.backbone), run.train.sequence_length, len(self.row_kinds(run))
        each = self.sized(run).rank // self.num_experts
        found = bank_cost(shape, length, self.num_experts, each, lambda layer: list(layer.matrices), routed=False)
        guess, linears = self.task == "guessed", sum(len(layer.matrices) for layer in shape.layers)
        more = tasks * WIDTH + linears * self.num_experts * (WIDTH + 1) + guess * tasks * (shape.hidden + 1)
        one = 2.0 * guess * tasks * shape.hidden
        return replace(
            found,
            flops=found.flops + Flops(one, one),
            total=found.total + more,
            trainable=found.trainable + more,
            added=found.added + more,
            active=found.active + more,
        )
