"""Suite `data`: batches from the packed stream, compared with Hugging Face datasets and collator."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mode.backbone.shape import read_shape
from mode.bench.suites.trainers import silence_libraries
from mode.bench.timing import Case
from mode.data.batches import Batches, Stream

if TYPE_CHECKING:
    from mode.config.run import Run
    from mode.methods.mode import MoDE

TOGETHER = 50
"""Number of batches of one run."""


def prepare_data(run: Run, method: MoDE, device: torch.device, folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Return cases that make batches, and the bytes of the rows on disk in either format.

    Args:
        run: Run with the batch size and the sequence length.
        method: Not used.
        device: Device of the batches.
        folder: Folder for the rows.
    """
    from datasets import Dataset

    size, length = run.train.batch.size, run.train.sequence_length
    rows = TOGETHER * size + 2
    vocabulary = read_shape(run.backbone).vocabulary
    kind = np.uint16 if vocabulary <= 2**16 else np.uint32
    stream = np.random.default_rng(0).integers(vocabulary, size=rows * length + 1, dtype=kind)
    np.save(folder / "stream.npy", stream)
    ours = Batches(
        [Stream("text", np.load(folder / "stream.npy", mmap_mode="r"), 1)],
        seed=0,
        batch_size=size,
        sequence_length=length,
    )
    folded = stream[: TOGETHER * size * length].reshape(-1, length).astype(np.int64)
    with silence_libraries():
        Dataset.from_dict({"input_ids": folded.tolist()}).save_to_disk(folder / "dataset")
    dataset = Dataset.load_from_disk(str(folder / "dataset"))

    def packed() -> None:
        for step in range(TOGETHER):
            torch.from_numpy(ours.batch(step)).to(device)

    tokens = TOGETHER * size * length
    ways = {
        "datasets, collator": make_loader(dataset, size, device),
        "datasets as tensors, collator": make_loader(dataset.with_format("torch"), size, device),
        "mode": packed,
    }
    cases = [Case("batches", name, way, tokens=tokens) for name, way in ways.items()]
    places = {"datasets": folder / "dataset", "mode": folder / "stream.npy"}
    return cases, {name: measure_size(place) for name, place in places.items()}


def make_loader(dataset: Any, size: int, device: torch.device) -> Callable[[], None]:
    """Return an action that takes batches from a dataset as `Trainer` does, with rows in random order."""
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    loader: Any = DataLoader(dataset, batch_size=size, shuffle=True, collate_fn=default_data_collator)

    def action() -> None:
        for _, batch in zip(range(TOGETHER), cycle(loader), strict=False):
            batch["input_ids"].to(device)

    return action


def measure_size(place: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())
