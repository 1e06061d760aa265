"""Named tensors: trainable parameters, averages, digests, and safetensors files that are written atomically."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mode.core.errors import ConfigError
from mode.core.files import sync_files, write_partial


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write tensors and JSON metadata to a safetensors file, atomically.

    Args:
        path: Path of the file. Missing parent folders are created.
        tensors: Tensors by name.
        metadata: Values that JSON can store, by name.

    Raises:
        ConfigError: The file cannot be written.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_partial(path, count_bytes(contiguous.values())) as partial:
            partial.mkdir()  # the library writes a temporary file beside the one that it is asked for
            save_file(contiguous, partial / path.name, metadata={"mode": json.dumps(metadata, sort_keys=True)})
            sync_files(partial)
            os.replace(partial / path.name, path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: cannot be written ({error})") from error


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the total size of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read a file that `save_tensors` wrote.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        ConfigError: The file is missing or truncated, or `save_tensors` did not write it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "mode" not in metadata:
                raise ConfigError(f"{path}: this safetensors file was not written by mode")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["mode"])  # noqa: SIM118
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file ({error})") from error


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of named tensors: names, shapes, data types and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name. A tied parameter appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def average_weights(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the arithmetic mean of several models' weights by name, accumulated in fp64.

    >>> import torch
    >>> average_weights([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 2.0])}])
    {'w': tensor([2., 2.])}
    """
    first, *_ = states
    return {
        name: (sum(state[name].double() for state in states) / len(states)).to(value.dtype)  # type: ignore[union-attr]
        for name, value in first.items()
    }
