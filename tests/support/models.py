"""What tests ask of a model: the digest of its weights, and its auxiliary loss."""

from __future__ import annotations

from torch import Tensor, nn

from mode.core.tensors import digest_tensors
from mode.ops.loss import find_auxiliary_modules, sum_auxiliary


def fingerprint_model(model: nn.Module) -> str:
    """Return a digest of a model's weights: names, shapes, data types and bytes."""
    return digest_tensors(model.state_dict())


def compute_auxiliary_loss(model: nn.Module) -> Tensor | None:
    """Return the sum of the auxiliary losses of a model's modules, or None if there are none."""
    return sum_auxiliary(find_auxiliary_modules(model))
