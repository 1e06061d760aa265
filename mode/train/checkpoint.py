"""Checkpoints of what trains, in torch's distributed format: parameters, AdamW moments and the loop's counters.

Every process writes its part, as safetensors, so that nothing is unpickled when it is read. A checkpoint is a folder
that appears when all parts are written. It does not matter how many processes wrote them and under which layout: one
that reads it takes what it holds itself.
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


COUNTERS = "counters"


class Writer(HuggingFaceStorageWriter):
    """Writes a checkpoint under another name, and gives it its own when every process has written its part."""

    def __init__(self, whole: Path) -> None:
        """Take the folder that a whole checkpoint is to be."""
        self.whole = whole
        super().__init__(str(whole.with_name(f".{whole.name}.partial")), save_distributed=True)

    def finish(self, metadata: Any, results: Any) -> None:
        """Put a whole checkpoint in its place, and let those before it go. In the first process."""
        os.replace(self.path, self.whole)
        with suppress(OSError):  # who goes on from here sweeps again
            remove_stale(self.whole.parent, self.whole)


def remove_stale(folder: Path, kept: Path | None) -> None:
    """Remove a run's checkpoints but one, and what processes that were killed left of others."""
    remove(*{*list_checkpoints(folder), *folder.glob(".checkpoint-*.partial")} - {kept})


class Saver:
    """Writes checkpoints while the steps after them go on: one at a time, from a copy in the processor's memory.

    Its context ends when the last one is written.
    """

    def __init__(self) -> None:
        """Begin with nothing to write. For all."""
        self.group = processes.side_group()
        self.writing: Any = None

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            ConfigError: It could not be.
        """
        self.wait()

    def save(
        self, folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any, step: int, seconds: float
    ) -> None:
        """Write parameters, their AdamW moments and the loop's counters. For all, each with what it holds.

        Args:
            folder: The run's.
            parameters: What trains and is here, by name; of a weight in shards this process's.
            optimizer: Theirs.
            step: Steps that are done.
            seconds: Seconds of training that they took.

        Raises:
            ConfigError: The checkpoint before could not be written.
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
        """Wait until what is being written is.

        Raises:
            ConfigError: It could not be.
        """
        if self.writing is not None:
            writing, self.writing = self.writing, None
            try:
                writing.result()
            except CheckpointException as error:
                raise ConfigError(f"{self.path}: cannot be written ({first_failure(error)})") from error


def read_counters(path: Path) -> tuple[int, float]:
    """Return the steps that a checkpoint is of, and the seconds of training that they took.

    Raises:
        ConfigError: It is damaged.
    """
    counters = torch.zeros(2, dtype=torch.float64)
    fill_tensors(path, {COUNTERS: counters})
    return int(counters[0]), float(counters[1])


def load_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Restore parameters, and an optimizer's moments of them, or what of both is here.

    Raises:
        ConfigError: The checkpoint is damaged, or does not have them.
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
    """Refuse a checkpoint of a model with other trainable parameters.

    Raises:
        ConfigError: It is one, or damaged.
    """
    saved = {name.removeprefix("parameter.") for name in list_names(path) if name.startswith("parameter.")}
    if differing := sorted(saved.symmetric_difference(parameters)):
        raise ConfigError(
            f"{path}: made by another model, or a file is missing: {differing[0]} is trainable in only one of the two"
        )


def list_names(path: Path) -> set[str]:
    """Return the names of the tensors in a checkpoint.

    Raises:
        ConfigError: It is damaged.
    """
    try:
        found: Any = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError) as error:
        raise damaged_error(path, str(error)) from error
    for name, tensor in found.items():  # torch takes what no file has for granted
        if sum(prod(chunk.sizes) for chunk in tensor.chunks) != prod(tensor.size):
            raise damaged_error(path, f"a part of {name} is missing")
    if COUNTERS not in found:
        raise damaged_error(path, f"no file has its {COUNTERS}")
    return set(found)


def fill_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, or this process's shards of them, with what a checkpoint has under their names.

    Raises:
        ConfigError: It is damaged, or does not have them.
    """
    try:
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    except CheckpointException as error:
        raise damaged_error(path, first_failure(error)) from error


def damaged_error(path: Path, why: str) -> ConfigError:
    """Return the error that a checkpoint cannot be read."""
    return ConfigError(f"{path}: not a whole checkpoint ({why}); remove it, and the run begins anew")


def first_failure(error: CheckpointException) -> str:
    """Return what went wrong in the first process in which something did."""
    return str(next(iter(error.failures.values()))[0])


# For good, since threads have no filters of their own: a process alone is told that it is one.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
