"""How a block of a MoDE model executes: settings of the training step and of analyses, not of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Execution:
    """How a block executes its branches. The default gives the plain computation of equation 2 on one process.

    Attributes:
        branches: Whether branches run in a `loop`, the experts `batched` as one computation, or every branch on a CUDA
            stream of its own (`streams`); see `mode.modular.branches`.
        bypass_experts: Whether the experts are left out, so that the block computes what the backbone computes.
        skip_unchosen: Whether a branch may skip tokens that did not choose it (`mode.modular.sparse`). The number of
            tokens to run is read from the device, so a CUDA graph cannot skip any.
        balanced: Whether tokens choose branches in turn, which gives every branch the same load whatever the gate says.
        exchange: Runs the block over several processes, each with some of the branches (`mode.distributed.mpmd`): takes
            the block, its input and the layers' arguments. None where all branches run in this process.
    """

    branches: Literal["loop", "batched", "streams"] = "loop"
    bypass_experts: bool = False
    skip_unchosen: bool = True
    balanced: bool = False
    exchange: Callable[..., Any] | None = None
