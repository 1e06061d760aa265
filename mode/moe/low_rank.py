"""Banks of small experts on a frozen linear layer: low-rank changes, or vectors that scale the layer's input or output.

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
    """W x + s sum_j a_j B_j A_j x. The outputs of the experts are mixed, not their factors.

    Attributes:
        base: The frozen layer.
        down: A, (N, r, d).
        up: B, (N, o, r); zero at the start, so that the initial experts change nothing.
        scale: s.
        router: Computes the weights a from x.
    """

    def __init__(self, base: nn.Module, num_experts: int, rank: int, scale: float, router: nn.Module) -> None:
        """Add experts to a layer. The initial experts do not change its output.

        Args:
            base: The layer.
            num_experts: N.
            rank: r.
            scale: s.
            router: Maps x, (..., d), to weights of the experts, (..., N).
        """
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
    """Balance loss over all output-gated banks of a model, - sum_i log q_i.

    q_i is the mean weight of expert i over layers and tokens. The minimum, N log N, is reached at equal weights.

    Attributes:
        balance: Weight of the loss.
        banks: The banks. Every `OutputGatedBank` adds itself.
    """

    def __init__(self, balance: float) -> None:
        """Start without banks."""
        self.balance = balance
        self.banks: list[OutputGatedBank] = []

    def compute(self) -> Tensor | None:
        """Return the weighted loss of the last forward pass; None outside training or with a weight of zero."""
        means = [bank.mean for bank in self.banks if bank.mean is not None]
        if not self.balance or len(means) < len(self.banks):
            return None
        loss: Tensor = -self.balance * torch.stack(means).mean(0).log().sum()
        return loss


class OutputGate(nn.Linear):
    """Weights of experts from their outputs, softmax(e [E_1 ... E_N] / tau); each output is normalised.

    Attributes:
        temperature: tau, (1,).
        weighs: True: the module's output is weights of experts.
    """

    weighs = True

    def __init__(self, count: int, outputs: int) -> None:
        """Initialise the gate with equal weights.

        Args:
            count: N.
            outputs: o.
        """
        super().__init__(count * outputs, count, bias=False)
        nn.init.zeros_(self.weight)
        self.temperature = nn.Parameter(torch.ones(1))  # a tensor without dimensions cannot be sharded

    def forward(self, experts: Tensor) -> Tensor:
        """Map the experts' outputs, (..., N, o), to their weights, (..., N), in fp32."""
        with torch.autocast(experts.device.type, enabled=False):
            inputs = functional.rms_norm(experts.float(), experts.shape[-1:], eps=1e-6).flatten(-2)
            logits: Tensor = functional.linear(inputs, self.weight.float()) / self.temperature
            return logits.softmax(-1)


class OutputGatedBank(nn.Module):
    """W x + sum_i G_i E_i of trained low-rank experts E_i = s B_i A_i x, with G = softmax(e [E_1 ... E_N] / tau).

    Attributes:
        base: The frozen layer.
        down: A, (N, r, d); frozen.
        up: B, (N, o, r); frozen.
        scale: s.
        gate: The gate with e, (N, N o), and tau; all experts have equal weights at the start.
        balance_loss: Loss over all banks of the model.
        mean: Mean weights of the experts in the last forward pass in training, (N,); otherwise None.
    """

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, scale: float, balance_loss: BalanceLoss) -> None:
        """Add trained experts to a layer, and the bank to the balance loss.

        Args:
            base: The layer.
            down: A of the trained experts, (N, r, d); copied.
            up: B of the trained experts, (N, o, r); copied.
            scale: s.
            balance_loss: Loss over all banks of the model.
        """
        super().__init__()
        count = len(down)
        self.base, self.scale = base, scale
        self.down = nn.Parameter(down.clone(), requires_grad=False)
        self.up = nn.Parameter(up.clone(), requires_grad=False)
        self.gate = OutputGate(count, read_linear_size(base)[1])
        self.mean: Tensor | None = None
        self.balance_loss = balance_loss
        balance_loss.banks.append(self)

    @property
    def auxiliary(self) -> Tensor | None:
        """Balance loss of all banks for the last bank, None for the others. Setting None deletes the bank's mean."""
        return self.balance_loss.compute() if self is self.balance_loss.banks[-1] else None

    @auxiliary.setter
    def auxiliary(self, value: None) -> None:
        self.mean = value

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
    """A layer whose input or output h is replaced by h * sum_j a_j l_j, with weights a that depend on h.

    Attributes:
        base: The frozen layer.
        scales: l, (N, d) or (N, o); ones at the start, so that the initial experts change nothing.
        router: Computes the weights a from h.
        before: Whether h is the layer's input; otherwise h is its output.
    """

    def __init__(self, base: nn.Module, num_experts: int, router: Router, *, before: bool) -> None:
        """Add experts to a layer. The initial experts do not change its output.

        Args:
            base: The layer.
            num_experts: N.
            router: Maps h to weights of the experts, (..., N).
            before: Whether h is the layer's input; otherwise h is its output.
        """
        super().__init__()
        self.base = base
        self.scales = nn.Parameter(torch.ones(num_experts, read_linear_size(base)[not before]))
        self.router = router
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., o)."""
        if self.before:
            out: Tensor = self.base(self.apply_scales(x))
            return out
        return self.apply_scales(self.base(x))

    def apply_scales(self, h: Tensor) -> Tensor:
        """Scale h, (..., d) or (..., o), by every token's mixture of the vectors."""
        return h * functional.linear(self.router(h), self.scales.float().T).to(h.dtype)


def read_linear_size(layer: Any) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer. The weight of GPT-2's `Conv1D` is transposed."""
    first, second = layer.weight.shape
    return (first, second) if type(layer).__name__ == "Conv1D" else (second, first)


def replace_linears(model: Any, names: Sequence[str] | str, make: Callable[[str, nn.Module], nn.Module]) -> None:
    """Replace the linear layers with given names in all decoder layers.

    Args:
        model: A causal LM, changed in place.
        names: Names of linear layers or last components of their paths in a decoder layer, such as `q_proj`; `all` for
            all linear layers.
        make: Maps the path of a linear layer in the model, and the layer, to the replacement.

    Raises:
        ConfigError: A name matches no linear layer.
    """
    from transformers.pytorch_utils import Conv1D

    trunk, name = find_layer_stack(model)
    layers = getattr(trunk, name)
    paths = [path for path, module in layers[0].named_modules() if isinstance(module, nn.Linear | Conv1D)]
    selected = paths if names == "all" else [path for path in paths if any(matches_name(path, end) for end in names)]
    ends = sorted({path.rpartition(".")[2] for path in paths})
    for end in () if names == "all" else names:
        if not any(matches_name(path, end) for path in paths):
            raise ConfigError(f"{end}: not one of the backbone's linear layers {', '.join(ends)}{suggest(end, ends)}")
    prefix = next(path for path, module in model.named_modules() if module is layers)
    for number, layer in enumerate(layers):
        for path in selected:
            parent, _, last = path.rpartition(".")
            module = make(f"{prefix}.{number}.{path}", layer.get_submodule(path))
            setattr(layer.get_submodule(parent), last, module)
