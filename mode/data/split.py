"""Assign documents to splits by hash and drop duplicates.

The split of a document depends only on its text, so adding, removing or reordering documents moves no other document.
Near duplicates are found by MinHash (Broder, 1997) over shingles of words, with banding. A text with little white
space, such as Chinese, Japanese, Thai or minified code, has shingles of characters. Near duplicates are dropped across
splits: if two documents in different splits are near duplicates, only the one in the more protected split is kept.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mode.config.data import SPLITS, Split

SHINGLE = 5
"""Words per shingle."""
CHARACTERS = 8
"""Characters per shingle of a text with little white space."""
LONG_WORDS = 16
"""Characters per word, white space included, from which a text has shingles of characters. Documents of the project's
own domains have at most 14.8."""
BANDS, ROWS = 16, 8
"""Documents of similarity s are compared with probability 1 - (1 - s^8)^16: 6 % at 0.5, 95 % at 0.8."""
THRESHOLD = 0.8
"""Smallest estimated Jaccard similarity of near duplicates."""


@dataclass(frozen=True)
class SplitDocuments:
    """Documents of each split, and the numbers of dropped exact and near duplicates."""

    documents: dict[Split, list[str]]
    exact_dropped: int
    near_dropped: int


def choose_split(text: str, shares: dict[Split, float]) -> Split:
    """Return the split of a document, which follows from the document's hash.

    >>> choose_split("a text", {"train": 1.0})
    'train'
    """
    point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    for name in SPLITS:
        point -= shares.get(name, 0.0)
        if point < 0:
            return name
    return "train"


def split_documents(texts: list[str], shares: dict[Split, float]) -> SplitDocuments:
    """Drop exact duplicates, split the documents by hash, and drop near duplicates across splits.

    Args:
        texts: Documents.
        shares: Share of each split; splits without a share are left out.

    Returns:
        The documents of each split in their given order, and the numbers of dropped documents.
    """
    unique = list(dict.fromkeys(texts))
    by_split: dict[Split, list[str]] = {name: [] for name in SPLITS if shares.get(name, 0.0) > 0.0}
    for text in unique:
        by_split[choose_split(text, shares)].append(text)
    ordered = [(name, text) for name, members in by_split.items() for text in members]
    duplicates = find_near_duplicates([text for _, text in ordered], [name for name, _ in ordered])
    kept: dict[Split, list[str]] = {name: [] for name in by_split}
    for index, (name, text) in enumerate(ordered):
        if index not in duplicates:
            kept[name].append(text)
    return SplitDocuments(documents=kept, exact_dropped=len(texts) - len(unique), near_dropped=len(duplicates))


def find_near_duplicates(texts: list[str], groups: list[Split]) -> set[int]:
    """Return the indices of documents that are near duplicates of an earlier document of another group."""
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
    """Return the MinHash signature of a document's shingles, (BANDS * ROWS,)."""
    shingles = {zlib.crc32(shingle.encode()) for shingle in make_shingles(text)}
    values = np.fromiter(shingles, np.uint64, len(shingles))
    result = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(values), 8192):  # all hashes of a long document would not fit in memory
        hashes = values[start : start + 8192, None] * MULTIPLIERS + OFFSETS
        result = np.minimum(result, hashes.min(axis=0))
    return result


def make_shingles(text: str) -> Iterator[str]:
    """Yield the shingles of a text: of words, or of characters if the text has little white space.

    >>> list(make_shingles("a text of more words"))
    ['a text of more words']
    >>> list(make_shingles("文字と文字のあいだに空白がありません。"))[:2]
    ['文字と文字のあい', '字と文字のあいだ']
    """
    words = text.split()
    if len(text) >= LONG_WORDS * len(words):
        joined = "".join(words)
        return (joined[i : i + CHARACTERS] for i in range(max(1, len(joined) - CHARACTERS + 1)))
    return (" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


# Multiply-add hashing modulo 2^64. The multipliers are odd, so each hash is a permutation of the 64-bit integers.
_generator = np.random.Generator(np.random.PCG64(20241014))
MULTIPLIERS = _generator.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
OFFSETS = _generator.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64)
