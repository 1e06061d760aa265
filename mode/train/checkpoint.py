"""Checkpoints in torch's distributed format: trainable parameters, optimizer state and the loop's counters.

Every process writes its part as safetensors, so that reading unpickles nothing. A checkpoint is a folder that appears
once all parts are written. Any number of processes under any layout can read it: each reads the part that it needs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from mode.core import processes
from mode.core.errors import ConfigError
from mode.core.files import checkpoint_folder, list_checkpoints, remove

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, by torch's names."""


COUNTERS = "counters"
"""Name of the tensor with the steps done and the seconds of training."""


class Writer(HuggingFaceStorageWriter):
    """Writes a checkpoint under a temporary name, and renames it when every process has written its part."""

    def __init__(self, whole: Path) -> None:
        """Write to a temporary folder beside `whole`, the folder of the complete checkpoint."""
        self.whole = whole
        super().__init__(str(whole.with_name(f".{whole.name}.partial")), save_distributed=True)

    def finish(self, metadata: Any, results: Any) -> None:
        """Rename the complete checkpoint, and remove the earlier ones. Runs in the first process."""
        os.replace(self.path, self.whole)
        with suppress(OSError):  # a run that resumes from here removes them too
            remove_stale(self.whole.parent, self.whole)


def remove_stale(folder: Path, kept: Path | None) -> None:
    """Remove all checkpoints of a run but one, and the partial ones of processes that were killed."""
    remove(*{*list_checkpoints(folder), *folder.glob(".checkpoint-*.partial")} - {kept})


class Saver:
    """Writes checkpoints in the background, one at a time, from a copy in CPU memory, while training continues.

    Leaving the context waits for the last checkpoint.
    """

    def __init__(self) -> None:
        """Start without a checkpoint to write. Collective: all processes must call it."""
        self.group = processes.side_group()
        self.writing: Any = None

    def __enter__(self) -> Self:
        """Return the saver."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            ConfigError: The last checkpoint could not be written.
        """
        self.wait()

    def save(
        self, folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any, step: int, seconds: float
    ) -> None:
        """Write parameters, their optimizer state and the loop's counters. Collective: all processes must call it.

        Args:
            folder: Work folder of the run.
            parameters: This process's trainable parameters, by name; of a sharded weight, this process's shard.
            optimizer: Their AdamW optimizer.
            step: Optimizer steps done.
            seconds: Seconds of training so far.

        Raises:
            ConfigError: The previous checkpoint could not be written.
        """
        self.wait()
        self.path = checkpoint_folder(folder, step)
        tensors = {COUNTERS: torch.tensor([step, seconds], dtype=torch.float64)}
        for name, parameter in parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach()
            if parameter in optimizer.state:
                tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
        self.writing = async_save(
            tensors, storage_writer=Writer(self.path), process_group=self.group, no_dist=self.group is None
        )

    def wait(self) -> None:
        """Wait for the checkpoint in progress.

        Raises:
            ConfigError: It could not be written.
        """
        if self.writing is not None:
            writing, self.writing = self.writing, None
            try:
                writing.result()
            except CheckpointException as error:
                raise ConfigError(f"{self.path}: cannot be written ({first_failure(error)})") from error


def read_counters(path: Path) -> tuple[int, float]:
    """Return the optimizer steps of a checkpoint, and the seconds of training that they took.

    Raises:
        ConfigError: The checkpoint is damaged.
    """
    counters = torch.zeros(2, dtype=torch.float64)
    fill_tensors(path, {COUNTERS: counters})
    return int(counters[0]), float(counters[1])


def load_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Restore this process's parameters and, with an optimizer, their optimizer state.

    Raises:
        ConfigError: The checkpoint is damaged, or a parameter is missing.
    """
    names = list_names(path)
    step = float(read_counters(path)[0])
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        if optimizer is not None and f"{MOMENTS[0]}.{name}" in names:
            moments = {moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS}
            tensors |= {f"{moment}.{name}": moments[moment] for moment in MOMENTS}
            steps = torch.tensor(step, dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter] = {"step": steps, **moments}
    fill_tensors(path, tensors)


def check_checkpoint(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Check that a checkpoint has exactly these trainable parameters.

    Raises:
        ConfigError: It has others, or is damaged.
    """
    saved = {name.removeprefix("parameter.") for name in list_names(path) if name.startswith("parameter.")}
    if differing := sorted(saved.symmetric_difference(parameters)):
        raise ConfigError(
            f"{path}: made by another model, or a file is missing: {differing[0]} is trainable in only one of the two"
        )


def list_names(path: Path) -> set[str]:
    """Return the names of the tensors in a checkpoint.

    Raises:
        ConfigError: The checkpoint is damaged.
    """
    try:
        found: Any = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError) as error:
        raise damaged_error(path, str(error)) from error
    for name, tensor in found.items():  # torch does not notice a missing file
        if sum(prod(chunk.sizes) for chunk in tensor.chunks) != prod(tensor.size):
            raise damaged_error(path, f"a part of {name} is missing")
    if COUNTERS not in found:
        raise damaged_error(path, f"no file has its {COUNTERS}")
    return set(found)


def fill_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, or this process's shards of them, from a checkpoint, by name.

    Raises:
        ConfigError: The checkpoint is damaged, or a tensor is missing.
    """
    try:
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    except CheckpointException as error:
        raise damaged_error(path, first_failure(error)) from error


def damaged_error(path: Path, why: str) -> ConfigError:
    """Return the error that a checkpoint cannot be read."""
    return ConfigError(f"{path}: not a whole checkpoint ({why}); remove it, and the run begins anew")


def first_failure(error: CheckpointException) -> str:
    """Return the error message of the first process that failed."""
    return str(next(iter(error.failures.values()))[0])


# Set once and for all, since threads have no filters of their own; torch warns of a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
