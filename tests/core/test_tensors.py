"""Weights are read as the run wrote them, or refused in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mode.core.tensors import digest_tensors, load_run_tensors, save_run_tensors, save_tensors
from tests.support.refusals import refused

WRITTEN = {"a.weight": torch.arange(6.0).view(2, 3), "scale": torch.tensor(0.5)}


def replace_content(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write other tensors into a file and keep its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(dict(tensors), path, metadata=metadata)


def test_weights_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_run_tensors(path, WRITTEN, "one")
    found = load_run_tensors(path, "one", WRITTEN)
    assert digest_tensors(found) == digest_tensors(WRITTEN)


CHANGES = {
    "scaled": {name: 1.5 * tensor for name, tensor in WRITTEN.items()},
    "one number": WRITTEN | {"scale": torch.tensor(0.5).nextafter(torch.tensor(1.0))},
    "integers": {name: tensor.int() for name, tensor in WRITTEN.items()},
    "half": {name: tensor.half() for name, tensor in WRITTEN.items()},
    "nan": WRITTEN | {"scale": torch.tensor(math.nan)},
    "infinite": WRITTEN | {"scale": torch.tensor(math.inf)},
    "another shape": WRITTEN | {"a.weight": torch.arange(6.0)},
    "one for all": WRITTEN | {"a.weight": torch.zeros(3)},
    "one less": {"scale": WRITTEN["scale"]},
    "one more": WRITTEN | {"b": torch.zeros(1)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_run_tensors(path, WRITTEN, "one")
    replace_content(path, CHANGES[change])
    with refused(str(path), "changed"):
        load_run_tensors(path, "one", WRITTEN)
    with refused(str(path), "changed"):
        load_run_tensors(path, "one")


@pytest.mark.parametrize("change", sorted(set(CHANGES) - {"scaled", "one number"}))
def test_weights_without_a_digest_are_checked_for_the_rest(tmp_path: Path, change: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_tensors(path, WRITTEN, {"run": "one"})
    assert load_run_tensors(path, "one", WRITTEN).keys() == WRITTEN.keys()
    replace_content(path, CHANGES[change])
    with refused(str(path)):
        load_run_tensors(path, "one", WRITTEN)


@pytest.mark.parametrize("metadata", ["{", "[]", "[" * 100_000])
def test_weights_with_damaged_metadata_are_refused(tmp_path: Path, metadata: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(WRITTEN, path, metadata={"mode": metadata})
    with refused(str(path)):
        load_run_tensors(path, "one")


@pytest.mark.parametrize(
    "save", [save_run_tensors, lambda path, tensors, run: save_tensors(path, tensors, {"run": run})]
)
def test_weights_of_another_run_are_refused(tmp_path: Path, save: object) -> None:
    path = tmp_path / "weights.safetensors"
    save(path, WRITTEN, "other")  # type: ignore[operator]
    with refused(str(path), "other", "one"):
        load_run_tensors(path, "one", WRITTEN)
