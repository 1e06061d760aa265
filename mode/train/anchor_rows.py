"""Rows sampled from a backbone, for an anchor that needs none of the text that the backbone was pretrained on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mode.backbone.load import load_model
from mode.backbone.tokenizer import load_tokenizer
from mode.config.backbone import Backbone
from mode.config.method import Anchor
from mode.core.digests import make_folder
from mode.core.files import remove, reporting_full_disk, write_synced
from mode.data.pack import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = "rows.bin"
"""File of the sampled tokens."""


SEED = 20241014
"""Seed of the samples, which are the same for every run on a backbone."""


TOGETHER = 64
"""Rows in a batch of samples."""


def load_or_sample_rows(
    anchor: Anchor, backbone: Backbone, fingerprint: str, length: int, cache: Path, device: torch.device
) -> Tokens:
    """Return a stream of rows sampled from a backbone, (rows * length,); sampled once, then read from the cache.

    Damaged rows are reported on stderr and sampled again.

    Args:
        anchor: Number of rows, temperature and prompt.
        backbone: The backbone.
        fingerprint: Fingerprint of its weights.
        length: Tokens per row.
        cache: Folder of prepared data.
        device: Device to sample on.

    Raises:
        ConfigError: The disk is full, or damaged rows would be others if they were sampled again.
    """
    tokenizer = load_tokenizer(backbone)
    asked = [SEED, fingerprint, length, anchor.rows, anchor.temperature, anchor.prompt]
    if tokenizer.bos_id is not None:
        asked.append(f"bos {tokenizer.bos_id}")
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    folder = cache / "sampled" / f"{backbone.name}-{key}"
    former = folder.with_suffix(".npy")

    def write(partial: Path) -> dict[str, str]:
        tokens = read_former_rows(former, anchor.rows * length)
        if tokens is None:
            model = load_model(backbone).eval().to(device)
            tokens = sample_rows(model, anchor, length, tokenizer.eos_id, tokenizer.bos_id)
        with reporting_full_disk(folder, tokens.nbytes):
            write_synced(partial / ROWS, tokens.data)
        return {}

    make_folder(folder, write, lambda folder: None)
    remove(former)
    stream: Tokens = np.memmap(folder / ROWS, np.uint32, mode="r")
    return stream


def read_former_rows(path: Path, count: int) -> Tokens | None:
    """Return the rows that an earlier version stored as one file without a digest; None without a whole file."""
    try:
        tokens: Tokens = np.load(path)
    except (OSError, EOFError, ValueError):
        return None
    return tokens if tokens.shape == (count,) and tokens.dtype == np.uint32 else None


@torch.no_grad()
def sample_rows(model: PreTrainedModel, anchor: Anchor, length: int, eos: int, bos: int | None = None) -> Tokens:
    """Sample rows into a stream, (rows * length,).

    Without a beginning-of-sequence token, a row begins with the end-of-sequence token, as a document of the training
    stream does, or with a random token. With one, a row begins with it, and then has the random token if there is one.
    A document that ends within a row is followed by another, which also begins with the beginning-of-sequence token.

    Args:
        model: A causal LM with a key-value cache.
        anchor: Number of rows, temperature and prompt.
        length: Tokens per row.
        eos: The end-of-sequence token.
        bos: The beginning-of-sequence token; None if documents do not begin with one.
    """
    random = torch.Generator().manual_seed(SEED)
    pieces = []
    for start in range(0, anchor.rows, TOGETHER):
        count = min(TOGETHER, anchor.rows - start)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        first = torch.full((count, 1), eos if bos is None else bos)
        if anchor.prompt == "token":
            drawn = torch.randint(vocabulary, (count, 1), generator=random)
            first = drawn if bos is None else torch.cat([first, drawn], 1)[:, :length]
        rows, cache = [first], None
        for _ in range(length - first.shape[1]):
            out: Any = model(
                input_ids=rows[-1].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = out.past_key_values
            chances = (out.logits[:, -1].float().cpu() / anchor.temperature).softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=random)
            rows.append(drawn if bos is None else drawn.masked_fill(rows[-1][:, -1:] == eos, bos))
        pieces.append(torch.cat(rows, 1).reshape(-1))
    stream: Tokens = torch.cat(pieces).numpy().astype(np.uint32)
    return stream
