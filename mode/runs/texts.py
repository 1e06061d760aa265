"""Small samples of the texts that a run's models know: what the backbone writes, and the training splits of targets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mode.config.method import SELF, Anchor
from mode.config.run import Run
from mode.runs.prepare import prepare_run

if TYPE_CHECKING:
    from torch import Tensor


def read_texts(run: Run, rows: int) -> list[Tensor]:
    """Return rows that are sampled from the backbone, then rows of the training split of every target, (N, S) each.

    Args:
        run: The run.
        rows: Maximum number of rows of a text, N. A small split has fewer.
    """
    import numpy as np
    import torch

    from mode.backbone.load import fingerprint_weights
    from mode.train.anchor_rows import load_or_sample_rows

    length, cache = run.train.sequence_length, Path(run.paths.cache).expanduser()
    anchor, cpu = Anchor(source=SELF, rows=rows), torch.device("cpu")
    sampled = load_or_sample_rows(anchor, run.backbone, fingerprint_weights(run.backbone), length, cache, cpu)
    packed = prepare_run(run).packed
    streams = [sampled, *(packed[name].split("train").tokens for name in run.targets)]
    found = []
    for stream in streams:
        count = min(rows, len(stream) // length)
        found.append(torch.from_numpy(np.asarray(stream[: count * length], dtype=np.int64)).view(count, length))
    return found
