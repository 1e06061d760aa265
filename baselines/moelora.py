"""MOELoRA (Liu et al., 2023): the rank of a LoRA is split over experts that are weighted by the task of a row.

At every adapted layer y = W0 x + (alpha / r) sum_i w_i(task) B_i A_i x. Each expert has rank r / N,
w = softmax(W e + b), and e is the embedding of the task. For one task, the experts can be merged into one adapter. A is
drawn from a normal distribution with standard deviation 0.01, and B = 0 at initialization.

Every source of the mix is a task. With `task=told`, the domain of a scored text is given, as published. All tasks have
equal weight for a domain that is no task. With `task=guessed`, a linear classifier weights the tasks for every token,
from the mean embedding of the text up to the token. The classifier is an addition of this project. All layers share the
embeddings of the tasks. The published dropout of 0.1 is left out.
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
from mode.cost.adapters import compute_bank_cost
from mode.cost.flops import Cost
from mode.methods.base import Material
from mode.methods.sizing import LowRank

if TYPE_CHECKING:
    from torch import nn


@settings(frozen=True, kw_only=True, config=STRICT)
class MOELoRA(LowRank):
    """Low-rank experts weighted by the task.

    Attributes:
        num_experts: Number of experts, N.
        task: Source of the task after training: given (`told`) or predicted (`guessed`).
    """

    recorded_as: ClassVar[str] = "baselines.moelora.MOELoRA"
    family: ClassVar[str] = "mixtures of low rank"
    source: ClassVar[str] = "Liu et al., 2023"
    weighs_experts: ClassVar[bool] = True
    identical_at_start: ClassVar[bool] = True

    num_experts: Annotated[int, Field(gt=0)]
    task: Literal["told", "guessed"]

    def __post_init__(self) -> None:
        if self.rank % self.num_experts:
            raise ValueError(f"rank={self.rank} is not divisible by num_experts={self.num_experts}")

    @property
    def least(self) -> int:
        """Smallest rank. Other ranks are its multiples, since all experts have the same rank."""
        return self.num_experts

    def row_kinds(self, run: Run) -> Mapping[str, int]:
        """Return the number of the task of every source of rows."""
        return {name: number for number, name in enumerate(self.mixture(run))}

    def build(self, run: Run, material: Material) -> nn.Module:
        """Return the backbone with experts at all linear layers of its decoder layers. Only new parameters train."""
        import torch

        from mode.moe.low_rank import LowRankBank, replace_linears
        from mode.moe.task_router import TaskRouter, Tasks, insert_tasks

        model = material.backbone()
        model.requires_grad_(False)
        torch.manual_seed(run.seed)
        rank = self.sized(run).rank // self.num_experts
        hidden = model.config.get_text_config().hidden_size
        tasks = Tasks(len(self.row_kinds(run)), hidden, guessed=self.task == "guessed")

        def make(path: str, base: nn.Module) -> nn.Module:
            router = TaskRouter(tasks, self.num_experts)
            bank = LowRankBank(base, self.num_experts, rank, self.scale, router)
            torch.nn.init.normal_(bank.down, std=0.01)
            return bank

        replace_linears(model, "all", make)
        insert_tasks(model, tasks)
        adapted: nn.Module = model
        return adapted

    def cost(self, run: Run) -> Cost:
        """Return the cost with experts on a frozen backbone. Operations of the gates, once per row, are left out."""
        from mode.moe.task_router import WIDTH

        shape, length, tasks = read_shape(run.backbone), run.train.sequence_length, len(self.row_kinds(run))
        rank = self.sized(run).rank // self.num_experts
        experts = compute_bank_cost(
            shape, length, self.num_experts, rank, lambda layer: list(layer.matrices), routed=False
        )
        guessed, linears = self.task == "guessed", sum(len(layer.matrices) for layer in shape.layers)
        more = tasks * WIDTH + linears * self.num_experts * (WIDTH + 1) + guessed * tasks * (shape.hidden + 1)
        classifier = 2.0 * guessed * tasks * shape.hidden
        return replace(
            experts,
            flops=experts.flops + Flops(classifier, classifier),
            total=experts.total + more,
            trainable=experts.trainable + more,
            added=experts.added + more,
            active=experts.active + more,
        )
