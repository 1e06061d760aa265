"""Setup that several suites share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mode.backbone.load import load_model
from mode.bench.timing import Case
from mode.config.check import build_method, replace_settings
from mode.config.groups import read_group
from mode.methods.anchored import Adaptation
from mode.methods.base import Material

if TYPE_CHECKING:
    from torch import nn

    from mode.config.run import Run


class Loop(Protocol):
    """Trains a model for `STEPS` steps on every call, and returns the seconds of all but the first step."""

    def resident(self) -> int:
        """Return the bytes of weights and optimizer state that stay allocated between calls."""

    def __call__(self) -> float:
        """Train, and return seconds."""


def load_method(name: str) -> Any:
    """Return a method with the settings of its YAML file."""
    return build_method(read_group("method", name))


@dataclass(frozen=True)
class Bench:
    """Setup of a loop.

    Attributes:
        run: Run with the backbone, the batch size and the sequence length.
        method: The method.
        device: Device of the model.
        folder: Folder for files of the loops.
        precision: Precision of matrix products.
    """

    run: Run
    method: Adaptation
    device: torch.device
    folder: Path
    precision: str

    @cached_property
    def lora(self) -> Any:
        """PEFT's settings of a low-rank method; None for full fine-tuning."""
        model: Any = self.method.build(
            replace_settings(self.run, method=self.method),
            Material(backbone=partial(load_model, self.run.backbone)),
        )
        return getattr(model, "peft_config", {}).get("default")

    def case(self, job: str, variant: str, loop: Loop, *, counted: bool = False) -> Case:
        """Return a case that times a loop."""
        tokens = (STEPS - 1) * self.run.train.batch.size * self.run.train.sequence_length
        cost = self.method.cost(replace_settings(self.run, method=self.method))
        flops = tokens * cost.flops.total if cost else 0.0
        return Case(
            job,
            variant,
            loop,
            tokens=tokens,
            flops=flops,
            precision=self.precision,
            resident=loop.resident,
            counted=counted,
        )


STEPS = 4
"""Optimizer steps of a loop. The first step is not timed, since it allocates the optimizer state."""


def count_weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers."""
    return sum(part.nbytes for part in (*model.parameters(), *model.buffers()))
