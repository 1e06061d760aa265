"""Divide documents by hash and drop those that occur twice.

Which split a document is in depends on its text alone, so adding, removing or reordering documents moves no other.
Near duplicates are found by MinHash (Broder, 1997) over shingles of words with banding, and dropped where they would
leak: of two alike documents in different splits only the one in the more protected split stays.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mode.config.data import SPLITS, Split

SHINGLE = 5
"""Words per shingle."""
BANDS, ROWS = 16, 8
"""Documents of similarity s become candidates with probability 1 - (1 - s^8)^16: 6 % at 0.5, 95 % at 0.8."""
THRESHOLD = 0.8
"""Estimated Jaccard similarity from which two documents count as near duplicates."""


@dataclass(frozen=True)
class Divided:
    """Documents per split, and how many were dropped as duplicates of another."""

    documents: dict[Split, list[str]]
    exact_dropped: int
    near_dropped: int


def choose_split(text: str, shares: dict[Split, float]) -> Split:
    """Return the split that a document's hash puts it in.

    >>> choose_split("a text", {"train": 1.0})
    'train'
    """
    point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    for name in SPLITS:
        point -= shares.get(name, 0.0)
        if point < 0:
            return name
    return "train"


def split_documents(texts: list[str], shares: dict[Split, float]) -> Divided:
    """Split documents by hash, then drop exact duplicates and near duplicates across splits.

    Args:
        texts: Documents.
        shares: Share of each split.

    Returns:
        The documents of each split in their given order, and the number of documents dropped.
    """
    unique = list(dict.fromkeys(texts))
    by_split: dict[Split, list[str]] = {name: [] for name in SPLITS if shares.get(name, 0.0) > 0.0}
    for text in unique:
        by_split[choose_split(text, shares)].append(text)
    ordered = [(name, text) for name, members in by_split.items() for text in members]
    twins = find_near_duplicates([text for _, text in ordered], [name for name, _ in ordered])
    kept: dict[Split, list[str]] = {name: [] for name in by_split}
    for index, (name, text) in enumerate(ordered):
        if index not in twins:
            kept[name].append(text)
    return Divided(documents=kept, exact_dropped=len(texts) - len(unique), near_dropped=len(twins))


def find_near_duplicates(texts: list[str], groups: list[Split]) -> set[int]:
    """Find the documents that are nearly the same as an earlier one of another group."""
    signatures = (
        np.stack([compute_signature(text) for text in texts]) if texts else np.zeros((0, BANDS * ROWS), np.uint64)
    )
    dropped: set[int] = set()
    for band in range(BANDS):
        buckets: dict[bytes, list[int]] = {}
        keys = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS])
        for index in range(len(texts)):
            if index in dropped:
                continue
            bucket = buckets.setdefault(keys[index].tobytes(), [])
            if any(
                groups[other] != groups[index] and float(np.mean(signatures[other] == signatures[index])) >= THRESHOLD
                for other in bucket
            ):
                dropped.add(index)
            else:
                bucket.append(index)
    return dropped


def compute_signature(text: str) -> NDArray[np.uint64]:
    """Return the MinHash signature of a document's word shingles, (BANDS * ROWS,)."""
    words = text.split()
    count = max(1, len(words) - SHINGLE + 1)
    shingles = {zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in range(count)}
    values = np.fromiter(shingles, np.uint64, len(shingles))
    result = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(values), 8192):  # a long document's shingles times all hashes would not fit in memory
        hashes = values[start : start + 8192, None] * MULTIPLIERS + OFFSETS
        result = np.minimum(result, hashes.min(axis=0))
    return result


# Multiply-shift hashing modulo 2^64: odd multipliers make each a permutation of the 64-bit integers.
_generator = np.random.Generator(np.random.PCG64(20241014))
MULTIPLIERS = _generator.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
OFFSETS = _generator.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64)
