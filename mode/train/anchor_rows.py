"""Rows that a backbone makes up itself, on which a model can be held to it without any text of what it knew."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mode.backbone.load import load_model
from mode.backbone.tokenizer import load_tokenizer
from mode.config.backbone import Backbone
from mode.config.method import Anchor
from mode.data.pack import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 20241014
"""Of the samples, which are the same for every run on a backbone."""


TOGETHER = 64
"""Rows that are sampled at one time."""


def load_or_sample_rows(
    anchor: Anchor, backbone: Backbone, fingerprint: str, length: int, cache: Path, device: torch.device
) -> Tokens:
    """Return a stream of rows sampled from a backbone, (rows * length,); sampled once, then kept.

    Args:
        anchor: How to sample.
        backbone: The model.
        fingerprint: That of its weights.
        length: Tokens of a row.
        cache: Folder of prepared data.
        device: Where to sample.
    """
    asked = [SEED, fingerprint, length, anchor.rows, anchor.temperature, anchor.prompt]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    path = cache / "sampled" / f"{backbone.name}-{key}.npy"
    if not path.exists():
        eos = load_tokenizer(backbone).eos_id
        tokens = sample_rows(load_model(backbone).eval().to(device), anchor, length, eos)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.npy")
        np.save(partial, tokens)
        partial.replace(path)
    stream: Tokens = np.load(path, mmap_mode="r")
    return stream


@torch.no_grad()
def sample_rows(model: PreTrainedModel, anchor: Anchor, length: int, eos: int) -> Tokens:
    """Sample rows one after the other into a stream, (rows * length,).

    A row begins with the end-of-sequence token, as a document does in the stream that was trained on, or with a random
    token. A document that ends within a row is followed by a new one.

    Args:
        model: A causal LM with a key-value cache.
        anchor: How to sample.
        length: Tokens of a row.
        eos: The end-of-sequence token.
    """
    random = torch.Generator().manual_seed(SEED)
    pieces = []
    for start in range(0, anchor.rows, TOGETHER):
        count = min(TOGETHER, anchor.rows - start)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        first = torch.full((count, 1), eos)
        if anchor.prompt == "token":
            first = torch.randint(vocabulary, (count, 1), generator=random)
        rows, cache = [first], None
        for _ in range(length - 1):
            out: Any = model(
                input_ids=rows[-1].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = out.past_key_values
            chances = (out.logits[:, -1].float().cpu() / anchor.temperature).softmax(-1)
            rows.append(torch.multinomial(chances, 1, generator=random))
        pieces.append(torch.cat(rows, 1).reshape(-1))
    stream: Tokens = torch.cat(pieces).numpy().astype(np.uint32)
    return stream
