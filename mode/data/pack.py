"""Tokenise a domain once and pack each split into a memory-mapped array with a fingerprint.

A split is one token stream: its documents in order, each followed by the end-of-sequence token. If the backbone has a
beginning-of-sequence token, every document begins with it. The offsets of the documents are stored beside the stream,
so that standard errors can be clustered by document.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mode.config.data import Domain, Split
from mode.core.digests import describe_files, make_folder
from mode.core.errors import ConfigError
from mode.core.files import reporting_full_disk, write_synced
from mode.data.sources import describe_source, digest_chunks, read_documents
from mode.data.split import SplitDocuments, split_documents

FORMAT = 1
"""Version of the packed format. A new version makes old caches invalid."""
META = "meta.json"
"""Index of a prepared domain: its fingerprint, the size of every split, and the digests of all files."""
PREPARATION = 1
"""Version of the reading and splitting of documents. A new version prepares every domain again. Unlike `FORMAT`, it is
not part of a fingerprint, so data that come out the same keep theirs."""
FEW = 5
"""Smallest number of effective documents of a split that is scored without a warning."""
Tokens = NDArray[np.uint16 | np.uint32]


class Tokenizer(Protocol):
    """The part of a tokenizer that packing uses."""

    eos_id: int
    bos_id: int | None
    vocab_size: int
    fingerprint: str

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenise documents. Each begins with the beginning-of-sequence token if there is one."""


@dataclass(frozen=True)
class PackedSplit:
    """One split of one domain.

    Attributes:
        tokens: Memory-mapped stream, (num_tokens,).
        starts: Offset of every document in the stream, then the length of the stream, (num_documents + 1,).
        num_bytes: Size of the documents in UTF-8 bytes.
        bos: The token that begins every document; None if there is none.
    """

    tokens: Tokens
    starts: NDArray[np.int64]
    num_bytes: int
    bos: int | None = None

    @property
    def effective_documents(self) -> float:
        """Number of equally long documents that would give as precise a score: (sum of lengths)² / sum of squares."""
        lengths = np.diff(self.starts).astype(np.float64)
        return float(lengths.sum() ** 2 / np.square(lengths).sum())


@dataclass(frozen=True)
class Packed:
    """A prepared domain.

    Attributes:
        name: Name of the domain.
        folder: Folder of the packed splits in the cache.
        meta: Content of the folder's `meta.json`: fingerprint, dropped duplicates, and the size of every split.
    """

    name: str
    folder: Path
    meta: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Digest of the format version, the tokenizer, and all tokens and offsets of all splits."""
        return str(self.meta["fingerprint"])

    def split(self, name: Split) -> PackedSplit:
        """Open a split without reading it into memory.

        Raises:
            ConfigError: The domain has no such split, or a file changed since the domain was prepared.
        """
        if name not in self.meta["splits"]:
            raise ConfigError(f"domain {self.name}: no {name} split; available: {', '.join(self.meta['splits'])}")
        info = self.meta["splits"][name]
        for file in name_files(name):
            path, expected = self.folder / file, self.meta["files"][file]["bytes"]
            if not path.exists() or path.stat().st_size != expected:
                raise ConfigError(f"{path}: changed since it was checked; repeat the command, which prepares it again")
        tokens = np.memmap(self.folder / f"{name}.bin", dtype=info["dtype"], mode="r")
        return PackedSplit(tokens, np.load(self.folder / f"{name}.starts.npy"), info["bytes"], self.meta.get("bos"))


def describe_small_splits(packed: Packed) -> list[str]:
    """Return a warning for every scored split of a domain whose score would rest on fewer than `FEW` documents."""
    warnings = []
    for name in ("validation", "test"):
        split = packed.split(name)
        if split.effective_documents < FEW:
            warnings.append(
                f"domain {packed.name}: the {name} split has {split.effective_documents:.2f} effective documents "
                f"({len(split.starts) - 1}, weighted by length), so single documents decide its scores; add documents"
            )
    return warnings


def prepare_domain(name: str, domain: Domain, tokenizer: Tokenizer, cache: Path) -> Packed:
    """Return a prepared domain from the cache. The first use prepares it.

    The sizes of the files are compared at every use, and their digests once per process. A damaged domain is reported
    on stderr and prepared again.

    Args:
        name: Name of the domain.
        domain: Settings of the domain.
        tokenizer: Tokenizer of the backbone.
        cache: Cache folder. The prepared domain is added to it atomically.

    Raises:
        ConfigError: A source cannot be read, a split is empty, the disk is full, or a damaged domain cannot be
            prepared again with the same content.
    """
    folder = locate_packed(name, domain, tokenizer, cache)

    def write(partial: Path) -> dict[str, Any]:
        meta = write_packed(partial, name, split_documents(read_documents(domain, cache), domain.splits), tokenizer)
        before = read_former_fingerprint(folder)
        if before not in (None, meta["fingerprint"]):
            raise ConfigError(
                f"{folder}: damaged, and its fingerprint would be {meta['fingerprint']} instead of {before} if it were "
                f"prepared again; remove the folder to accept that"
            )
        return meta

    return Packed(name, folder, make_folder(folder, write, lambda old: adopt_packed(old, tokenizer), META))


def name_files(split: str) -> tuple[str, str]:
    """Return the names of a split's files: its tokens, and the offsets of its documents."""
    return f"{split}.bin", f"{split}.starts.npy"


def read_former_meta(folder: Path) -> dict[str, Any] | None:
    """Return the `meta.json` of a domain that an earlier version prepared, without digests; else None."""
    try:
        meta = json.loads((folder / META).read_text("utf-8"))
        return meta if isinstance(meta, dict) and "files" not in meta else None
    except (OSError, ValueError, RecursionError):
        return None


def read_former_fingerprint(folder: Path) -> str | None:
    """Return the fingerprint of a domain that an earlier version prepared; else None."""
    return (read_former_meta(folder) or {}).get("fingerprint")


def adopt_packed(folder: Path, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return the index of a domain that an earlier version prepared, if the files still have its fingerprint."""
    meta = read_former_meta(folder)
    try:
        if meta is None:
            return None
        streams = {
            split: (np.fromfile(folder / f"{split}.bin", info["dtype"]), np.load(folder / f"{split}.starts.npy"))
            for split, info in meta["splits"].items()
        }
        if digest_streams(streams, tokenizer) != meta["fingerprint"]:
            return None
    except (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError):
        return None
    return {**meta, "files": describe_files(folder, [file for split in streams for file in name_files(split)])}


def digest_streams(streams: Mapping[str, tuple[Tokens, NDArray[np.int64]]], tokenizer: Tokenizer) -> str:
    """Return the fingerprint of the tokens and the offsets of all splits, in order."""
    total = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint}".encode())
    for split, (stream, starts) in streams.items():
        total.update(split.encode() + stream.astype("<u4").tobytes() + starts.tobytes())
    return total.hexdigest()[:16]


def locate_packed(name: str, domain: Domain, tokenizer: Tokenizer, cache: Path) -> Path:
    """Return the folder of a domain in the cache. The folder need not exist."""
    return cache / "packed" / f"{name}-{make_state_key(domain, tokenizer.fingerprint)}"


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a complete prepared domain."""
    return (folder / META).exists()


def make_state_key(domain: Domain, *more: str) -> str:
    """Return a key of a domain's settings and the state of its sources, without preparing the domain.

    Args:
        domain: Settings of the domain.
        more: Further parts of the key, such as a tokenizer's fingerprint.
    """
    settings = json.dumps([FORMAT, PREPARATION, asdict(domain)], sort_keys=True, default=str)
    states = [describe_source(source) for source in domain.sources]
    return digest_chunks(part.encode() for part in (settings, *more, *states))[:16]


def write_packed(folder: Path, name: str, divided: SplitDocuments, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write the packed splits of a domain to a folder, and return the content of its `meta.json`.

    Raises:
        ConfigError: A split has no document, or the disk is full.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    streams: dict[str, tuple[Tokens, NDArray[np.int64]]] = {}
    splits: dict[str, Any] = {}
    for split, documents in divided.documents.items():
        if not documents:
            count = sum(map(len, divided.documents.values()))
            raise ConfigError(
                f"domain {name}: of {count} document{'s' * (count != 1)}, none fell into the {split} split; add "
                f"documents, raise the split's share, or divide text files by `separator` in their source"
            )
        pieces = [np.asarray([*ids, tokenizer.eos_id], dtype) for ids in tokenizer.encode(documents)]
        starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
        streams[split] = np.concatenate(pieces), starts
        splits[split] = {
            "documents": len(documents),
            "tokens": len(streams[split][0]),
            "bytes": sum(len(text.encode()) for text in documents),
            "dtype": dtype.name,
        }
    with reporting_full_disk(folder, sum(stream.nbytes + starts.nbytes for stream, starts in streams.values())):
        for each, (stream, starts) in streams.items():
            stored = io.BytesIO()
            np.save(stored, starts)
            for file, data in zip(name_files(each), (stream.data, stored.getbuffer()), strict=True):
                write_synced(folder / file, data)
    return {
        "fingerprint": digest_streams(streams, tokenizer),
        "exact_duplicates_dropped": divided.exact_dropped,
        "near_duplicates_dropped": divided.near_dropped,
        "splits": splits,
        **({} if tokenizer.bos_id is None else {"bos": tokenizer.bos_id}),
    }
