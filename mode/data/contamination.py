"""Contamination: the share of an evaluation split that also occurs, word for word, in training text.

The measure is the share of a split's 13-token n-grams that occur in another split (after Brown et al., 2020, appendix
C, who use 13 words). Generated exercises and files with similar headers share n-grams without being duplicates. Read a
share together with the number of duplicates that were dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mode.config.data import Split
from mode.core.digests import read_sealed, write_sealed
from mode.core.errors import warn
from mode.data.pack import Packed, Tokens
from mode.data.sources import digest_chunks

N = 13
"""Tokens per n-gram."""
CHUNK = 2**20
"""N-grams of training text that are looked up at one time."""
PRETRAINING = "pretraining"
"""Key of the share that occurs in the backbone's pretraining text."""


def measure_contamination(
    packed: Mapping[str, Packed], split: Split, pretraining: Mapping[str, str]
) -> dict[str, dict[str, float | None]]:
    """Measure the overlap of each domain's split with every training split and with the backbone's pretraining text.

    Args:
        packed: Prepared domains.
        split: The split that is scored.
        pretraining: Fingerprints of the data that the backbone was pretrained on, by domain; empty if unknown.

    Returns:
        For each domain, shares between 0 and 1: one per domain with a training split, by that domain's name, and under
        `pretraining` the share that occurs in any pretrain split. The latter is None if the pretraining data are
        unknown or not among the prepared domains.
    """
    available = all(name in packed and packed[name].fingerprint == known for name, known in pretraining.items())
    before = [packed[name] for name in pretraining] if pretraining and available else None
    trained = {name: data for name, data in packed.items() if "train" in data.meta["splits"]}
    shares: dict[str, dict[str, float | None]] = {}
    for name, data in packed.items():
        shares[name] = {other: measure_overlap(data, split, [text], "train") for other, text in trained.items()}
        shares[name][PRETRAINING] = None if before is None else measure_overlap(data, split, before, "pretrain")
    return shares


def measure_overlap(data: Packed, split: Split, others: Sequence[Packed], name: Split) -> float:
    """Return the share of a split's n-grams that occur in a split of other domains. The result is cached on disk.

    Args:
        data: Domain that is scored.
        split: Split of the domain that is scored.
        others: Domains to compare with.
        name: Split of these domains.
    """
    key = digest_chunks(part.encode() for part in (str(N), split, name, *(other.fingerprint for other in others)))[:16]
    path = data.folder / f"contamination-{key}.json"
    content, of = read_sealed(path), f"{data.fingerprint}-{key}"
    if content is None or content.get("of") != of:
        if path.exists() and not is_former_share(path):
            warn(f"{path}: damaged; the share is measured again")
        texts = (other.split(name).tokens for other in others)
        content = {"of": of, "share": measure_seen_share(texts, data.split(split).tokens)}
        write_sealed(path, content)
    return float(content["share"])


def is_former_share(path: Path) -> bool:
    """Return whether a file has a share that an earlier version wrote, as a number without a digest."""
    try:
        return 0.0 <= float(path.read_text("utf-8")) <= 1.0
    except (OSError, ValueError):
        return False


def measure_seen_share(texts: Iterable[Tokens], scored: Tokens, n: int = N) -> float:
    """Return the share of a stream's token n-grams that also occur in at least one of the texts."""
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
