"""Tokenise a domain once and pack each split into a memory-mapped array with a fingerprint.

A split is one stream: the tokens of its documents in order, each closed by the end-of-sequence token. Beside it lie
the offsets of the documents, so that errors can be clustered by document.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mode.config.data import Domain, Split
from mode.core.errors import ConfigError
from mode.data.sources import describe_source, digest_chunks, read_documents
from mode.data.split import Divided, split_documents

FORMAT = 1
"""Raised when what is packed changes, so that old caches are not read."""
Tokens = NDArray[np.uint16 | np.uint32]


class Tokenizer(Protocol):
    """What packing needs of a tokenizer."""

    eos_id: int
    vocab_size: int
    fingerprint: str

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenise documents, without special tokens."""


@dataclass(frozen=True)
class PackedSplit:
    """One split of one domain.

    Attributes:
        tokens: Memory-mapped stream, (num_tokens,).
        starts: Offset of every document in the stream, and the end of the last, (num_documents + 1,).
        num_bytes: UTF-8 bytes of the documents.
    """

    tokens: Tokens
    starts: NDArray[np.int64]
    num_bytes: int


@dataclass(frozen=True)
class Packed:
    """A prepared domain: its folder, its description, and its splits."""

    name: str
    folder: Path
    meta: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Digest of every token of every split, and of how they came to be."""
        return str(self.meta["fingerprint"])

    def split(self, name: Split) -> PackedSplit:
        """Open one split.

        Raises:
            ConfigError: The domain has no such split.
        """
        if name not in self.meta["splits"]:
            raise ConfigError(f"domain {self.name} has no {name} split; it has {', '.join(self.meta['splits'])}")
        info = self.meta["splits"][name]
        tokens = np.memmap(self.folder / f"{name}.bin", dtype=info["dtype"], mode="r")
        return PackedSplit(tokens, np.load(self.folder / f"{name}.starts.npy"), info["bytes"])


def prepare_domain(name: str, domain: Domain, tokenizer: Tokenizer, cache: Path) -> Packed:
    """Return a prepared domain from the cache, preparing it on first use.

    Args:
        name: Name of the domain.
        domain: Its settings.
        tokenizer: Tokenizer of the backbone.
        cache: Cache folder; a prepared domain appears in it whole or not at all.

    Raises:
        ConfigError: A source cannot be read, or a split comes out empty.
    """
    folder = locate_packed(name, domain, tokenizer, cache)
    if not is_whole(folder):
        divided = split_documents(read_documents(domain, cache), domain.splits)
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        try:
            write_packed(work, name, divided, tokenizer)
            os.replace(work, folder)
        except OSError:
            if not is_whole(folder):  # else another process finished the same work first
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return Packed(name=name, folder=folder, meta=json.loads((folder / "meta.json").read_text()))


def locate_packed(name: str, domain: Domain, tokenizer: Tokenizer, cache: Path) -> Path:
    """Return the folder that a prepared domain has in the cache, or would have."""
    return cache / "packed" / f"{name}-{make_state_key(domain, tokenizer.fingerprint)}"


def is_whole(folder: Path) -> bool:
    """Say whether a prepared domain is in a folder."""
    return (folder / "meta.json").exists()


def make_state_key(domain: Domain, *more: str) -> str:
    """Return a key that changes with a domain's settings and the state of its sources; reads no document."""
    settings = json.dumps([FORMAT, asdict(domain)], sort_keys=True, default=str)
    states = [describe_source(source) for source in domain.sources]
    return digest_chunks(part.encode() for part in (settings, *more, *states))[:16]


def write_packed(folder: Path, name: str, divided: Divided, tokenizer: Tokenizer) -> None:
    """Write every split of a domain and its description."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    total = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint}".encode())
    splits: dict[str, Any] = {}
    for split, documents in divided.documents.items():
        if not documents:
            raise ConfigError(
                f"domain {name}: no document fell into the {split} split; more documents or a larger share are needed"
            )
        pieces = [np.asarray([*ids, tokenizer.eos_id], dtype) for ids in tokenizer.encode(documents)]
        starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
        stream = np.concatenate(pieces)
        stream.tofile(folder / f"{split}.bin")
        np.save(folder / f"{split}.starts.npy", starts)
        total.update(split.encode() + stream.astype("<u4").tobytes() + starts.tobytes())
        splits[split] = {
            "documents": len(documents),
            "tokens": len(stream),
            "bytes": sum(len(text.encode()) for text in documents),
            "dtype": dtype.name,
        }
    meta = {
        "fingerprint": total.hexdigest()[:16],
        "exact_duplicates_dropped": divided.exact_dropped,
        "near_duplicates_dropped": divided.near_dropped,
        "splits": splits,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
