"""Experts weighed by the task that a row is from, told or guessed from what came before it (MOELoRA).

Shapes: T tasks, N experts, B rows, S tokens per row, d hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from mode.backbone.structure import find_layer_stack, resize_cache_slots
from mode.config.method import GateSettings
from mode.gating.gate import Gate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH = 64
"""Size of a task's embedding, as published."""


class Tasks(nn.Module):
    """Which task every row is from: told, or guessed token by token from the mean embedding of the prefix.

    Attributes:
        embedding: Embeddings of the tasks, (T, 64).
        guess: What guesses, by a softmax over tasks; None where tasks are told.
        row_kinds: The rows' tasks, (B,) or (1,), as told; below 0 for none of them, which weighs all alike.
        weights: Weights of the tasks in the latest forward pass, (B, S or 1, T).
        auxiliary: Cross-entropy of the guess, in training.
    """

    def __init__(self, count: int, hidden: int, *, guessed: bool) -> None:
        """Begin with random embeddings, and no idea of the task."""
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(count, WIDTH))
        self.guess = Gate(hidden, count - 1, settings=GateSettings(scope="prefix")) if guessed else None
        if self.guess is not None:
            self.guess.weighs = False  # tasks, not experts: it is none of the routers that records tell of
        self.row_kinds: Tensor | None = None
        self.weights: Tensor | None = None
        self.auxiliary: Tensor | None = None

    def look(self, embedded: Tensor, cache: Any, mask: Tensor | None) -> None:
        """Weigh the tasks for rows whose tokens are embedded, (B, S, d), before the decoder runs."""
        told, self.auxiliary = self.told(len(embedded), embedded.device), None
        if self.guess is None:
            self.weights = told
            return
        self.guess.padding = mask
        guessed = self.guess(embedded.detach(), cache)
        if self.training and self.row_kinds is not None:
            self.auxiliary = -(told * guessed.clamp(min=1e-9).log()).sum(-1).mean()
        self.weights = told if self.training else guessed

    def told(self, rows: int, device: torch.device) -> Tensor:
        """Return the weights of the tasks that were told, (B, 1, T): all on one, or the same for all."""
        count = len(self.embedding)
        if self.row_kinds is None:
            return torch.full((rows, 1, count), 1.0 / count, device=device)
        kinds = self.row_kinds.expand(rows)
        one = functional.one_hot(kinds.clamp(min=0), count).float()
        return torch.where(kinds[:, None] < 0, 1.0 / count, one)[:, None]


class TaskRouter(nn.Linear):
    """Weights of a layer's experts: sum_t p(t) softmax(W e_t + b) over the tasks t of a row.

    Attributes:
        tasks: What says which task a row is from; inside a tuple, since it is no part of this module.
        weighs: That its output are weights of experts.
    """

    weighs = True

    def __init__(self, tasks: Tasks, num_experts: int) -> None:
        """Begin as a linear layer does."""
        super().__init__(WIDTH, num_experts)
        self.tasks = (tasks,)

    def forward(self, states: Tensor) -> Tensor:
        """Map what a layer reads, (B, S, d), of which the size alone counts, to weights of experts, (B, S, N)."""
        (tasks,) = self.tasks
        with torch.autocast(states.device.type, enabled=False):
            each = functional.linear(tasks.embedding.float(), self.weight.float(), self.bias.float()).softmax(-1)
            assert tasks.weights is not None
            return (tasks.weights @ each).expand(*states.shape[:-1], -1)


def insert_tasks(model: PreTrainedModel, tasks: Tasks) -> None:
    """Let a causal LM look at its rows' tasks before its decoder runs; a guess takes one slot of the cache more."""
    trunk, name = find_layer_stack(model)
    model.add_module("tasks", tasks)
    if tasks.guess is not None:
        depth = len(getattr(trunk, name))
        tasks.guess.slot = depth
        model.config = trunk.config = resize_cache_slots(model.config, [*range(depth), -1])

    def before(
        module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = args[0] if args else options.get("input_ids")
        embedded = options.get("inputs_embeds")
        embedded = model.get_input_embeddings()(ids) if embedded is None else embedded
        cached = options.get("use_cache", model.config.use_cache)
        if tasks.guess is not None and cached and options.get("past_key_values") is None:
            options["past_key_values"] = DynamicCache(config=model.config)
        tasks.look(embedded, options.get("past_key_values"), options.get("attention_mask"))
        return args, options

    trunk.register_forward_pre_hook(before, with_kwargs=True)
