"""Banks of small experts on a frozen linear layer: low-rank changes of it, or vectors that scale what goes in or out.

Shapes: N experts, r rank, d inputs and o outputs of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mode.backbone.shape import matches_name
from mode.backbone.structure import find_layer_stack
from mode.core.errors import ConfigError, suggest
from mode.gating.router import Router


class LowRankBank(nn.Module):
    """W x + s sum_j a_j B_j A_j x: the experts' outputs are mixed, not their factors.

    Attributes:
        base: The frozen layer.
        down: A, (N, r, d).
        up: B, (N, o, r); zero at the start, so that nothing is changed.
        scale: s.
        router: Weights a of x.
    """

    def __init__(self, base: nn.Module, num_experts: int, rank: int, scale: float, router: nn.Module) -> None:
        """Put experts beside a layer that change nothing yet."""
        super().__init__()
        inputs, outputs = read_linear_size(base)
        self.base = base
        self.down = nn.Parameter(torch.randn(num_experts, rank, inputs) * 0.02)
        self.up = nn.Parameter(torch.zeros(num_experts, outputs, rank))
        self.scale = scale
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., o)."""
        count, rank, _ = self.down.shape
        low = functional.linear(x, self.down.flatten(0, 1)).view(*x.shape[:-1], count, rank)
        low = (self.scale * self.router(x)[..., None] * low).flatten(-2)
        change = functional.linear(low, self.up.transpose(0, 1).flatten(1))
        out: Tensor = self.base(x)
        return out + change.to(out.dtype)


class BalanceLoss:
    """The banks of one model, for a loss that is over all of them.

    Attributes:
        balance: Weight of the loss - sum_i log q_i, with q_i expert i's mean weight over layers and tokens: N log N at
            its least, where all are the same.
        banks: The banks.
    """

    def __init__(self, balance: float) -> None:
        """Begin without banks."""
        self.balance = balance
        self.banks: list[OutputGatedBank] = []

    def loss(self) -> Tensor | None:
        """Return the loss of the last forward pass, if that was in training."""
        means = [bank.mean for bank in self.banks if bank.mean is not None]
        if not self.balance or len(means) < len(self.banks):
            return None
        loss: Tensor = -self.balance * torch.stack(means).mean(0).log().sum()
        return loss


class OutputGate(nn.Linear):
    """softmax(e [E_1 ... E_N] / tau): weights of experts by what they say, each normalised, side by side.

    Attributes:
        temperature: tau, (1,).
        weighs: That its output are weights of experts.
    """

    weighs = True

    def __init__(self, count: int, outputs: int) -> None:
        """Weigh all experts the same."""
        super().__init__(count * outputs, count, bias=False)
        nn.init.zeros_(self.weight)
        self.temperature = nn.Parameter(torch.ones(1))  # not a number alone, which has no shards

    def forward(self, experts: Tensor) -> Tensor:
        """Map the experts' outputs, (..., N, o), to their weights, (..., N), in fp32."""
        with torch.autocast(experts.device.type, enabled=False):
            read = functional.rms_norm(experts.float(), experts.shape[-1:], eps=1e-6).flatten(-2)
            logits: Tensor = functional.linear(read, self.weight.float()) / self.temperature
            return logits.softmax(-1)


class OutputGatedBank(nn.Module):
    """W x + sum_i G_i E_i of trained low-rank experts E_i = s B_i A_i x, with G = softmax(e [E_1 ... E_N] / tau).

    Attributes:
        base: The frozen layer.
        down: A, (N, r, d); frozen.
        up: B, (N, o, r); frozen.
        scale: s.
        gate: e, (N, N o), and tau; all experts weigh the same at the start.
        ledger: Where all of a model's are.
        mean: The experts' mean weights in the last forward pass, (N,), if that was in training.
    """

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, scale: float, ledger: BalanceLoss) -> None:
        """Put trained experts beside a layer."""
        super().__init__()
        count = len(down)
        self.base, self.scale = base, scale
        self.down = nn.Parameter(down.clone(), requires_grad=False)
        self.up = nn.Parameter(up.clone(), requires_grad=False)
        self.gate = OutputGate(count, read_linear_size(base)[1])
        self.mean: Tensor | None = None
        self.ledger = ledger
        ledger.banks.append(self)

    @property
    def auxiliary(self) -> Tensor | None:
        """The ledger's loss, at the last bank. To set it to None is to forget this bank's mean."""
        return self.ledger.loss() if self is self.ledger.banks[-1] else None

    @auxiliary.setter
    def auxiliary(self, nothing: None) -> None:
        self.mean = nothing

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., o)."""
        count, rank, _ = self.down.shape
        low = functional.linear(x, self.down.flatten(0, 1)).view(*x.shape[:-1], count, rank)
        experts = self.scale * torch.einsum("...nr,nor->...no", low, self.up.to(low.dtype))
        weights = self.gate(experts)
        self.mean = weights.flatten(0, -2).mean(0) if self.training else None
        out: Tensor = self.base(x)
        mixed: Tensor = (weights[..., None] * experts).sum(-2)
        return out + mixed.to(out.dtype)


class VectorBank(nn.Module):
    """A layer whose input or output h becomes h * sum_j a_j l_j, with weights a of h itself.

    Attributes:
        base: The frozen layer.
        scales: l, (N, d) or (N, o); ones at the start, so that nothing is changed.
        router: Weights a of what is scaled.
        before: Whether it is the layer's input that is scaled.
    """

    def __init__(self, base: nn.Module, num_experts: int, router: Router, *, before: bool) -> None:
        """Put experts at a layer that change nothing yet."""
        super().__init__()
        self.base = base
        self.scales = nn.Parameter(torch.ones(num_experts, read_linear_size(base)[not before]))
        self.router = router
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., o)."""
        if self.before:
            out: Tensor = self.base(self.scaled(x))
            return out
        return self.scaled(self.base(x))

    def scaled(self, h: Tensor) -> Tensor:
        """Scale (..., d) token by token."""
        return h * functional.linear(self.router(h), self.scales.float().T).to(h.dtype)


def read_linear_size(layer: Any) -> tuple[int, int]:
    """Return the inputs and outputs of a linear layer; GPT-2's keep their weight the other way round."""
    first, second = layer.weight.shape
    return (first, second) if type(layer).__name__ == "Conv1D" else (second, first)


def replace_linears(model: Any, names: Sequence[str] | str, make: Callable[[str, nn.Module], nn.Module]) -> None:
    """Put a module in the place of every linear layer of that name in a decoder's layers.

    Args:
        model: A causal LM, changed in place.
        names: Ends of the layers' paths in a decoder layer, such as `q_proj`; `all` for every one.
        make: From a layer's path in the model and the layer to what takes its place.

    Raises:
        ConfigError: No layer has one of the names.
    """
    from transformers.pytorch_utils import Conv1D

    trunk, name = find_layer_stack(model)
    layers = getattr(trunk, name)
    paths = [path for path, each in layers[0].named_modules() if isinstance(each, nn.Linear | Conv1D)]
    wanted = paths if names == "all" else [path for path in paths if any(matches_name(path, end) for end in names)]
    ends = sorted({path.rpartition(".")[2] for path in paths})
    for end in () if names == "all" else names:
        if not any(matches_name(path, end) for path in paths):
            raise ConfigError(f"{end}: not one of the backbone's linear layers {', '.join(ends)}{suggest(end, ends)}")
    prefix = next(path for path, module in model.named_modules() if module is layers)
    for number, layer in enumerate(layers):
        for path in wanted:
            parent, _, last = path.rpartition(".")
            module = make(f"{prefix}.{number}.{path}", layer.get_submodule(path))
            setattr(layer.get_submodule(parent), last, module)
