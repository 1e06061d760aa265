"""Checkpoints of what trains: parameters, AdamW moments and counters, in one safetensors file written atomically."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mode.checked import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write tensors and JSON metadata to a safetensors file, atomically.

    Raises:
        ConfigError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(contiguous, temporary, metadata={"mode": json.dumps(metadata, sort_keys=True)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: cannot be written ({error})") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read tensors and metadata written by `save_tensors`.

    Raises:
        ConfigError: The file is missing, truncated, or not one of this project's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "mode" not in metadata:
                raise ConfigError(f"{path}: a safetensors file, but not one that mode wrote")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["mode"])  # noqa: SIM118
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file ({error})") from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of named tensors: names, shapes, kinds and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


class Saver:
    """Writes checkpoints while the steps after them go on: one at a time, from a copy in the processor's memory.

    Its context ends when the last one is written.
    """

    def __init__(self) -> None:
        """Begin with nothing to write."""
        self.pool = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            ConfigError: It could not be.
        """
        self.wait()

    def save(self, path: Path, model: nn.Module, optimizer: Any, counters: Mapping[str, object]) -> None:
        """Write the trainable parameters, their AdamW moments (the optimizer's `state`), and the loop's counters.

        Raises:
            ConfigError: The checkpoint before could not be written.
        """
        self.wait()
        tensors: dict[str, Tensor] = {}
        for name, parameter in trainable(model).items():
            tensors[f"parameter.{name}"] = parameter
            for moment in MOMENTS:
                if parameter in optimizer.state:
                    tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
        apart = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self.writing = self.pool.submit(save_tensors, path, apart, counters)

    def wait(self) -> None:
        """Wait until what is being written is.

        Raises:
            ConfigError: It could not be.
        """
        if self.writing is not None:
            self.writing.result()


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Restore what a `Saver` wrote and return the loop's counters.

    Raises:
        ConfigError: The file is damaged, or belongs to a model with other trainable parameters.
    """
    tensors, counters = load_tensors(path)
    parameters = trainable(model)
    saved = {name.removeprefix("parameter.") for name in tensors if name.startswith("parameter.")}
    if saved != set(parameters):
        differing = sorted(saved.symmetric_difference(parameters))
        raise ConfigError(f"{path}: made by another model; {differing[0]} is trainable in only one of the two")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            if f"{MOMENTS[0]}.{name}" in tensors:
                state = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS}
                step = torch.tensor(float(str(counters["step"])), dtype=torch.float32)
                optimizer.state[parameter] = {"step": step.to(parameter.device), **state}
    return counters


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name; a tied parameter appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
