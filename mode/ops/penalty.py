"""A penalty on the distance of the trained weights from their initial values.

R = (weight / 2) sum_i F_i (theta_i - theta_i^0)^2. L2-SP has F_i = 1, EWC the diagonal of the Fisher information.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mode.core.tensors import list_trainable
from mode.ops.loss import compute_hidden_states, compute_next_token_loss, find_head, find_softcap


class WeightPenalty(nn.Module):
    """The penalty as an auxiliary loss of a model, which the objective adds (`mode.ops.loss.find_auxiliary_modules`).

    The module is a part of the model, so that its initial values follow the model to a device. It owns no parameters,
    and its tensors are not part of the model's state.
    """

    def __init__(
        self, model: nn.Module, weight: float, importance: Callable[[], Mapping[str, Tensor]] | None = None
    ) -> None:
        """Penalise the distance of a model's trainable parameters from their present values.

        Args:
            model: The model.
            weight: Factor on the penalty.
            importance: Returns F_i for every trainable parameter, by name, in its shape. It is called in the first
                training step.
        """
        super().__init__()
        self.weight, self.importance = weight, importance
        self.penalised = list_trainable(model)
        self.factors: list[Tensor] = []
        for number, parameter in enumerate(self.penalised.values()):
            self.register_buffer(f"start{number}", parameter.detach().clone(), persistent=False)

    @property
    def auxiliary(self) -> Tensor | None:
        """The penalty, a scalar in fp32; None outside of training."""
        if not self.training:
            return None
        if self.importance is not None and not self.factors:
            found = self.importance()
            self.factors = [found[name].to(value.device) for name, value in self.penalised.items()]
        total = torch.zeros((), device=next(iter(self.penalised.values())).device)
        for number, parameter in enumerate(self.penalised.values()):
            square = (parameter - self.get_buffer(f"start{number}")).square()
            total = total + (square * self.factors[number] if self.factors else square).sum()
        return 0.5 * self.weight * total


def estimate_fisher(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Return the diagonal of the Fisher information of a model's trainable parameters, per token, by name.

    F_i = E_row[(d log p(row) / d theta_i)^2] / (S - 1) over rows that the model itself sampled. For small changes
    (1 / 2) sum_i F_i (theta_i - theta_i^0)^2 is the diagonal part of the KL divergence per token.

    Args:
        model: A causal LM.
        rows: Rows of tokens that the model sampled, (N, S).
    """
    parameters = list_trainable(model)
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for number in range(len(rows)):
        row = rows[number : number + 1]
        states = compute_hidden_states(model, row[:, :-1])
        loss = compute_next_token_loss(states, find_head(model), row[:, 1:], find_softcap(model))
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for value, gradient in zip(total.values(), gradients, strict=True):
            value += gradient.square()
    # The loss is a mean over S - 1 tokens, so its gradient squared times (S - 1)^2 is that of the row.
    return {name: value * (rows.shape[1] - 1) / len(rows) for name, value in total.items()}
