"""Weights of experts by the task of a row, which is given or predicted from the row's prefix (MOELoRA).

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
    """Weights of the tasks of every row. Tasks are given, or predicted at every token from the mean embedding so far.

    Attributes:
        embedding: Embeddings of the tasks, (T, 64).
        guess: Gate that predicts the weights of the tasks; None if tasks are given.
        row_kinds: Given tasks of the rows, (B,) or (1,). A negative number means an unknown task, with equal weights.
        weights: Weights of the tasks in the latest forward pass, (B, S or 1, T).
        auxiliary: Cross-entropy of the prediction in training; otherwise None.
    """

    def __init__(self, count: int, hidden: int, *, guessed: bool) -> None:
        """Initialise random embeddings and, if tasks are predicted, a gate with equal weights.

        Args:
            count: T.
            hidden: d.
            guessed: Whether tasks are predicted.
        """
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(count, WIDTH))
        self.guess = Gate(hidden, count - 1, settings=GateSettings(scope="prefix")) if guessed else None
        if self.guess is not None:
            self.guess.weighs = False  # it weighs tasks, not experts, so records do not list it as a router
        self.row_kinds: Tensor | None = None
        self.weights: Tensor | None = None
        self.auxiliary: Tensor | None = None

    def weigh(self, embedded: Tensor, cache: Any, mask: Tensor | None) -> None:
        """Set the weights of the tasks before the decoder runs. Training uses given tasks, evaluation predicted ones.

        Args:
            embedded: Embeddings of the rows' tokens, (B, S, d).
            cache: Key-value cache, or None.
            mask: Which of the tokens so far are text, or None.
        """
        given, self.auxiliary = self.weigh_given(len(embedded), embedded.device), None
        if self.guess is None:
            self.weights = given
            return
        self.guess.padding = mask
        predicted = self.guess(embedded.detach(), cache)
        if self.training and self.row_kinds is not None:
            self.auxiliary = -(given * predicted.clamp(min=1e-9).log()).sum(-1).mean()
        self.weights = given if self.training else predicted

    def weigh_given(self, rows: int, device: torch.device) -> Tensor:
        """Return the weights of given tasks, (B, 1, T): one-hot, or equal for an unknown task."""
        count = len(self.embedding)
        if self.row_kinds is None:
            return torch.full((rows, 1, count), 1.0 / count, device=device)
        kinds = self.row_kinds.expand(rows)
        one_hot = functional.one_hot(kinds.clamp(min=0), count).float()
        return torch.where(kinds[:, None] < 0, 1.0 / count, one_hot)[:, None]


class TaskRouter(nn.Linear):
    """Weights of a layer's experts, sum_t p(t) softmax(W e_t + b) over the tasks t of a row.

    Attributes:
        tasks: The model's `Tasks`, in a tuple so that torch does not register it as a submodule.
        weighs: True: the module's output is weights of experts.
    """

    weighs = True

    def __init__(self, tasks: Tasks, num_experts: int) -> None:
        """Initialise the weights like those of a linear layer."""
        super().__init__(WIDTH, num_experts)
        self.tasks = (tasks,)

    def forward(self, states: Tensor) -> Tensor:
        """Return weights of experts, (B, S, N). Only the shape of the layer's input, (B, S, d), matters."""
        (tasks,) = self.tasks
        with torch.autocast(states.device.type, enabled=False):
            weights = functional.linear(tasks.embedding.float(), self.weight.float(), self.bias.float()).softmax(-1)
            assert tasks.weights is not None
            return (tasks.weights @ weights).expand(*states.shape[:-1], -1)


def insert_tasks(model: PreTrainedModel, tasks: Tasks) -> None:
    """Add tasks to a causal LM and weigh them before the decoder runs. Predicted tasks take one more cache slot."""
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
        tasks.weigh(embedded, options.get("past_key_values"), options.get("attention_mask"))
        return args, options

    trunk.register_forward_pre_hook(before, with_kwargs=True)
