"""What several suites set up alike."""

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
    """Trains a model for `STEPS` steps when called, and returns the seconds of all but the first."""

    def resident(self) -> int:
        """Return the bytes of weights and optimizer states that stay between two calls."""

    def __call__(self) -> float:
        """Train."""


def load_method(name: str) -> Any:
    """Return a method of the project as its YAML describes it."""
    return build_method(read_group("method", name))


@dataclass(frozen=True)
class Bench:
    """What a loop trains, and how.

    Attributes:
        run: Names backbone, rows and their length.
        method: The method.
        device: Where it trains.
        folder: For what loops write.
        precision: Of its products of matrices.
    """

    run: Run
    method: Adaptation
    device: torch.device
    folder: Path
    precision: str

    @cached_property
    def lora(self) -> Any:
        """A low-rank method's settings as PEFT's, or None for full fine-tuning."""
        made: Any = self.method.build(
            replace_settings(self.run, method=self.method),
            Material(backbone=partial(load_model, self.run.backbone)),
        )
        return getattr(made, "peft_config", {}).get("default")

    def case(self, job: str, variant: str, loop: Loop, *, counted: bool = False) -> Case:
        """Return what to time."""
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
"""Optimizer steps that a loop makes each time. The first, in which an optimizer's states are made, is not timed."""


def count_weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights."""
    return sum(part.nbytes for part in (*model.parameters(), *model.buffers()))
