"""Weights of tokens in a training step, for methods that train on some tokens more than on others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from mode.core import processes
from mode.core.errors import ConfigError

if TYPE_CHECKING:
    from mode.config.train import Train
    from mode.train.step_batch import StepBatch

Weigh = Callable[[int, Tensor], Tensor]
"""From a step and its rows of tokens, (B, S + 1), to the weight of every token's cross-entropy, (B, S)."""


def check_weighing(settings: Train, weigh: Weigh | None) -> None:
    """Check that the settings of the loop go with weights of tokens.

    Raises:
        ConfigError: Weights are given, but there are several processes, a CUDA graph, or attention within documents.
    """
    if weigh is None:
        return
    if processes.world_size() > 1:
        raise ConfigError("a method that weighs the tokens of a step goes with one process; start it without --nproc")
    if settings.kernels.cuda_graph:
        raise ConfigError("train.kernels.cuda_graph=true: not with a method that weighs tokens; leave it off")
    if settings.batch.intra_document_masking:
        raise ConfigError(
            "train.batch.intra_document_masking=true: not with a method that weighs tokens by losses of whole rows; "
            "leave it off"
        )


def weigh_tokens(batch: StepBatch, step: int, weigh: Weigh | None) -> StepBatch:
    """Return the rows of a step with the weights of their tokens; the same batch where all tokens count alike.

    The weights are those of all rows of the step, so they do not depend on the number of micro-batches.
    """
    return batch if weigh is None else replace(batch, weights=weigh(step, batch.tokens))


def measure_share(batch: StepBatch) -> dict[str, float]:
    """Return the share of the tokens of a step that train, for a point of the curve; nothing without weights."""
    return {} if batch.weights is None else {"trained_share": float((batch.weights > 0).float().mean())}
