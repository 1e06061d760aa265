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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata["mode"])
        if not isinstance(about, dict):
            raise ValueError("its metadata are not a JSON object")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except ConfigError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file ({error})") from error
    return tensors, about


def save_run_tensors(path: Path, tensors: Mapping[str, Tensor], run: str) -> None:
    """Write tensors of a run to a safetensors file, with the run's id and a digest of the tensors.

    Args:
        path: Path of the file.
        tensors: Tensors by name.
        run: Id of the run.

    Raises:
        ConfigError: The file cannot be written.
    """
    save_tensors(path, tensors, {"run": run, "digest": digest_tensors(tensors)})


def load_run_tensors(path: Path, run: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Read tensors of a run that `save_run_tensors` wrote.

    Files of earlier versions have no digest. Their tensors are checked for everything but the digest.

    Args:
        path: Path of the file.
        run: Id of the run.
        like: Tensors with the names, shapes and data types that the file must have; None for any.

    Raises:
        ConfigError: The file is missing or truncated, or its tensors are of another run or another model, changed since
            they were written, or not finite numbers.
    """
    tensors, about = load_tensors(path)
    fix = "remove the file, and train the run again"
    if about.get("run", run) != run:
        raise ConfigError(f"{path}: weights of run {about['run']}, not of run {run}; {fix}")
    if "digest" in about and digest_tensors(tensors) != about["digest"]:
        raise ConfigError(f"{path}: its weights changed since they were written; {fix}")
    for name in sorted({*tensors, *like}) if like is not None else ():
        found, wanted = (describe_tensor(group.get(name)) for group in (tensors, like or {}))
        if found != wanted:
            raise ConfigError(f"{path}: not the weights of this run's model: {name} is {found}, not {wanted}; {fix}")
    check_finite(path, tensors)
    return tensors


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that weights are finite floating-point numbers.

    Args:
        path: Path of the file or folder of the weights, for the message.
        tensors: Weights by name.

    Raises:
        ConfigError: A tensor has integers, infinite numbers or NaN.
    """
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and all(bound.isfinite() for bound in tensor.aminmax())):
            raise ConfigError(f"{path}: {name} ({describe_tensor(tensor)}) is not all finite floating-point numbers")


def describe_tensor(tensor: Tensor | None) -> str:
    """Return the shape and the data type of a tensor as text.

    >>> describe_tensor(torch.zeros(2, 3)), describe_tensor(None)
    ('float32 (2, 3)', 'missing')
    """
    if tensor is None:
        return "missing"
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of named tensors: names, shapes, data types and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def list_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
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
