"""Checkpoints in torch's distributed format: trainable parameters, optimizer state and the loop's counters.

Every process writes its part as safetensors, so that reading unpickles nothing. An index, which is written last, holds
the sizes and digests of all parts and of the training curve up to this step. A checkpoint is a folder that appears once
the index is written. Any number of processes under any layout can read it: each reads the part that it needs.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from math import isfinite, prod
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
from mode.core.digests import INDEX, describe_files, find_damage, read_sealed, write_sealed
from mode.core.errors import ConfigError, warn
from mode.core.files import (
    CURVE,
    find_full_disk,
    full_disk_error,
    list_checkpoints,
    locate_checkpoint,
    measure_free_space,
    remove,
)
from mode.core.tensors import count_bytes

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, by torch's names."""


COUNTERS = "counters"
"""Name of the tensor with the steps done and the seconds of training."""


class Writer(HuggingFaceStorageWriter):
    """Writes a checkpoint under a temporary name, and renames it when every process has written its part."""

    def __init__(self, whole: Path, about: Mapping[str, Any]) -> None:
        """Write to a temporary folder beside `whole`, the folder of the complete checkpoint.

        Args:
            whole: Folder of the complete checkpoint.
            about: Content of the index besides the digests of the parts.
        """
        self.whole, self.about = whole, about
        super().__init__(str(make_partial_folder(whole)), save_distributed=True)

    def finish(self, metadata: Any, results: Any) -> None:
        """Write the index, rename the complete checkpoint, and remove the earlier ones. Runs in the first process."""
        partial = Path(self.path)
        write_sealed(partial / INDEX, {**self.about, "files": describe_files(partial)})
        os.replace(partial, self.whole)
        with suppress(OSError):  # a run that resumes from here removes them too
            remove_stale(self.whole.parent, self.whole)


def make_partial_folder(whole: Path) -> Path:
    """Return the temporary folder of a checkpoint, which all processes write to."""
    return whole.with_name(f".{whole.name}.partial")


def describe_curve(curve: Path) -> dict[str, Any]:
    """Return the size and the sha256 of the training curve as it is now; an empty description without a curve."""
    if not curve.exists():
        return {}
    content = curve.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def remove_stale(folder: Path, kept: Path | None) -> None:
    """Remove all checkpoints of a run but one, and the partial ones of processes that were killed."""
    remove(*{*list_checkpoints(folder), *folder.glob(".checkpoint-*.partial")} - {kept})


class Saver:
    """Writes checkpoints in the background, one at a time, from a copy in CPU memory, while training continues.

    Leaving the context waits for the last checkpoint.
    """

    def __init__(self) -> None:
        """Start without a checkpoint to write. Collective: all processes must call it."""
        self.group = processes.make_side_group()
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
        self.path = locate_checkpoint(folder, step)
        tensors = {COUNTERS: torch.tensor([step, seconds], dtype=torch.float64)}
        for name, parameter in parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach()
            if parameter in optimizer.state:
                tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
        self.size, self.free = count_bytes(tensors.values()), measure_free_space(self.path)
        about = {"step": step, "curve": describe_curve(folder / CURVE)} if processes.is_main() else {}
        self.writing = async_save(
            tensors, storage_writer=Writer(self.path, about), process_group=self.group, no_dist=self.group is None
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
                if processes.is_main():
                    with suppress(OSError):
                        remove(make_partial_folder(self.path))
                failure = first_failure(error)
                if reason := find_full_disk(failure):
                    raise full_disk_error(self.path, reason, self.size, self.free) from error
                raise ConfigError(f"{self.path}: cannot be written ({failure})") from error


def read_counters(path: Path) -> tuple[int, float]:
    """Return the optimizer steps of a checkpoint, and the seconds of training that they took.

    Raises:
        ConfigError: The checkpoint is damaged.
    """
    counters = torch.zeros(2, dtype=torch.float64)
    check_tensors(path, find_tensors(path), {COUNTERS: counters})
    fill_tensors(path, {COUNTERS: counters})
    step, seconds = counters.tolist()
    if f"{step:.0f}" != path.name.rpartition("-")[2] or not (step > 0.0 <= seconds and isfinite(seconds)):
        raise damaged_error(path, f"its counters are {step:g} steps and {seconds:g} seconds")
    return int(step), seconds


def load_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Restore this process's parameters and, with an optimizer, their optimizer state.

    Raises:
        ConfigError: The checkpoint is damaged, or a parameter is missing.
    """
    names = find_tensors(path)
    step = float(read_counters(path)[0])
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        if optimizer is not None and f"{MOMENTS[0]}.{name}" in names:
            moments = {moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS}
            tensors |= {f"{moment}.{name}": moments[moment] for moment in MOMENTS}
            steps = torch.tensor(step, dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter] = {"step": steps, **moments}
    fill_tensors(path, tensors)


def find_checkpoint_damage(path: Path) -> str | None:
    """Return which file of a checkpoint, or of its training curve, is damaged, and why; None if all are whole.

    Checkpoints of earlier versions have no index. They count as whole.
    """
    if not (path / INDEX).exists():
        return None
    index = read_sealed(path / INDEX)
    if index is None:
        return f"{INDEX} is damaged"
    if extra := sorted({part.name for part in path.glob("*.safetensors")} - set(index["files"])):
        return f"{extra[0]} is not a part of it"
    curve, known = path.with_name(CURVE), index["curve"]
    if known:
        content = curve.read_bytes()[: known["bytes"]] if curve.exists() else b""
        if hashlib.sha256(content).hexdigest() != known["sha256"]:
            return f"{curve} differs from the curve that the checkpoint was written with"
    return find_damage(path, index["files"])


def check_checkpoint(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Check that a checkpoint is whole and has exactly these trainable parameters, with their shapes and data types.

    The first process compares the digests of all parts.

    Raises:
        ConfigError: It has others, or is damaged.
    """
    if processes.is_main():
        if why := find_checkpoint_damage(path):
            raise damaged_error(path, why)
        if not (path / INDEX).exists():
            warn(f"{path}: written by an earlier version, without digests; its content is not checked")
    found = find_tensors(path)
    saved = {name.removeprefix("parameter.") for name in found if name.startswith("parameter.")}
    if differing := sorted(saved.symmetric_difference(parameters)):
        raise ConfigError(
            f"{path}: made by another model, or a file is missing: {differing[0]} is trainable in only one of the two"
        )
    for prefix in ("parameter", *MOMENTS):
        check_tensors(path, found, {f"{prefix}.{name}": parameter for name, parameter in parameters.items()})


def check_tensors(path: Path, found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Check the shapes and data types of the tensors that a checkpoint has.

    Args:
        path: Folder of the checkpoint.
        found: The checkpoint's tensors, as `find_tensors` describes them.
        expected: Tensors of the expected shapes and types, by name.

    Raises:
        ConfigError: One differs.
    """
    for name, tensor in expected.items():
        stored = found.get(name)
        if stored is None:  # a parameter that was never used has no optimizer state
            continue
        kinds = [
            (str(kind).removeprefix("torch."), list(size))
            for kind, size in ((stored.properties.dtype, stored.size), (tensor.dtype, tensor.shape))
        ]
        if kinds[0] != kinds[1]:
            (dtype, size), (own_dtype, own_size) = kinds
            raise damaged_error(path, f"{name} is {dtype} of shape {size} instead of {own_dtype} of shape {own_size}")


def find_tensors(path: Path) -> dict[str, Any]:
    """Return torch's description of the tensors in a checkpoint, by name: data type, shape and parts.

    Raises:
        ConfigError: The checkpoint is damaged.
    """
    try:
        found: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise damaged_error(path, str(error)) from error
    for name, tensor in found.items():  # torch does not notice a missing file
        if sum(prod(chunk.sizes) for chunk in tensor.chunks) != prod(tensor.size):
            raise damaged_error(path, f"a part of {name} is missing")
    if COUNTERS not in found:
        raise damaged_error(path, f"no file has its {COUNTERS}")
    return found


def fill_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, or this process's shards of them, from a checkpoint, by name.

    Raises:
        ConfigError: The checkpoint is damaged, or a tensor is missing.
    """
    try:
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    except CheckpointException as error:
        raise damaged_error(path, str(first_failure(error))) from error


def damaged_error(path: Path, why: str) -> ConfigError:
    """Return the error that a checkpoint cannot be used, with the way to continue without it."""
    whole = [each for each in list_checkpoints(path.parent) if each != path and not find_checkpoint_damage(each)]
    way = f"to continue from {whole[-1].name}" if whole else "or add --again, to train from the start"
    return ConfigError(f"{path}: damaged: {' '.join(why.split())}; remove this folder{'' if whole else ','} {way}")


def first_failure(error: CheckpointException) -> BaseException:
    """Return the error of the first process that failed."""
    failure: BaseException = next(iter(error.failures.values()))[0]
    return failure


# Set once and for all, since threads have no filters of their own; torch warns of a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
