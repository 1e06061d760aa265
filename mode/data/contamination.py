"""Contamination: how much of what is scored occurs, word for word, in text that a model was trained on.

Measured as the share of a split's 13-token n-grams that occur in another split (after Brown et al., 2020, appendix C,
who take 13 words). Generated exercises and files with like headers share n-grams without being the same document, so
a share is to be read beside the number of duplicates that were dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mode.config.data import Split
from mode.core.files import write_atomic
from mode.data.pack import Packed, Tokens
from mode.data.sources import digest_chunks

N = 13
"""Tokens per n-gram."""
CHUNK = 2**20
"""N-grams of training text looked up at one time."""
PRETRAINING = "pretraining"
"""Column of the text that the backbone was pretrained on."""


def measure_contamination(
    packed: Mapping[str, Packed], split: Split, pretraining: Mapping[str, str]
) -> dict[str, dict[str, float | None]]:
    """Measure what of each domain's split occurs in every training split, and in the backbone's pretraining.

    Args:
        packed: Prepared domains.
        split: The split that is scored.
        pretraining: Fingerprints of the data that the backbone was pretrained on, by domain; empty if unknown.

    Returns:
        By domain: the share, 0 to 1, by the domain whose training split it occurs in, and under `pretraining` that of
        all pretrain splits together; None where what the backbone was pretrained on is not known or not here.
    """
    here = all(name in packed and packed[name].fingerprint == known for name, known in pretraining.items())
    before = [packed[name] for name in pretraining] if pretraining and here else None
    trained = {name: data for name, data in packed.items() if "train" in data.meta["splits"]}
    found: dict[str, dict[str, float | None]] = {}
    for name, data in packed.items():
        found[name] = {other: measure_overlap(data, split, [text], "train") for other, text in trained.items()}
        found[name][PRETRAINING] = None if before is None else measure_overlap(data, split, before, "pretrain")
    return found


def measure_overlap(data: Packed, split: Split, others: Sequence[Packed], name: Split) -> float:
    """Return the share of a split's n-grams that occur in one split of other domains; counted once, then kept."""
    key = digest_chunks(part.encode() for part in (str(N), split, name, *(other.fingerprint for other in others)))[:16]
    path = data.folder / f"contamination-{key}.json"
    if not path.exists():
        texts = (other.split(name).tokens for other in others)
        write_atomic(path, json.dumps(measure_seen_share(texts, data.split(split).tokens)).encode())
    return float(json.loads(path.read_text("utf-8")))


def measure_seen_share(texts: Iterable[Tokens], scored: Tokens, n: int = N) -> float:
    """Return the share of a stream's token n-grams, (num_tokens - n + 1,), that also occur in some of the texts."""
    if len(scored) < n:
        return 0.0
    sought, where = np.unique(hash_ngrams(scored, n), return_inverse=True)
    seen = np.zeros(len(sought), np.bool_)
    for text in texts:
        for start in range(0, len(text) - n + 1, CHUNK):
            hashes = hash_ngrams(text[start : start + CHUNK + n - 1], n)
            places = np.minimum(np.searchsorted(sought, hashes), len(sought) - 1)
            seen[places[sought[places] == hashes]] = True
    return float(seen[where].mean())


def hash_ngrams(tokens: Tokens, n: int) -> NDArray[np.uint64]:
    """Return a 64-bit rolling hash of every n-gram of a token stream, (num_tokens - n + 1,)."""
    hashes = np.zeros(len(tokens) - n + 1, np.uint64)
    for offset in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens[offset : offset + len(hashes)] + np.uint64(1)
    return hashes
