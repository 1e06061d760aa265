"""Digests of files and of plain data, and folders that are checked against an index of digests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from mode.core.errors import ConfigError, warn
from mode.core.files import make_partial_path, remove, remove_leftovers, sync_files, write_atomic, write_partial

INDEX = "digests.json"
"""Index of a folder that is checked: the size and the sha256 of every file."""


DIGEST = "digest"
"""Key of the digest of a JSON object, in the object."""


def digest_file(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal.

    A file is read once per process: the digest is kept while the file's size and modification time stay the same.

    Raises:
        OSError: The file cannot be read.
    """
    status = path.stat()
    return digest_content(path, status.st_size, status.st_mtime_ns)


@cache
def digest_content(path: Path, size: int, modified: int) -> str:
    """Return the sha256 of a file that has this size and this modification time in nanoseconds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object together with its digest, atomically.

    Raises:
        ConfigError: The disk is full.
    """
    write_atomic(path, json.dumps({**content, DIGEST: digest_json(content)}, indent=1).encode())


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Read a JSON object that `write_sealed` wrote; None if the file is missing or damaged, or has no digest."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return content if content.pop(DIGEST) == digest_json(content) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def digest_json(content: object) -> str:
    """Return the sha256 of plain data as JSON, which does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return the size and the sha256 of files of a folder, by their path in the folder; by default, of all files."""
    if names is None:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names = sorted(names)
    with ThreadPoolExecutor() as pool:  # a thread that computes a digest does not hold the interpreter's lock
        digests = pool.map(digest_file, [folder / name for name in names])
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }


def find_damage(folder: Path, files: Mapping[str, Any]) -> str | None:
    """Return which file of a folder is damaged, and why; None if all files are whole.

    The size of a file is always compared, and its digest once per process (`digest_file`).

    Args:
        folder: The folder.
        files: What `describe_files` returned when the folder was written.
    """
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
            if digest_file(path) != expected["sha256"]:
                return f"{name} has another sha256 than when it was written"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


def make_folder(
    folder: Path,
    write: Callable[[Path], Mapping[str, Any]],
    adopt: Callable[[Path], Mapping[str, Any] | None],
    index: str = INDEX,
) -> dict[str, Any]:
    """Make a folder atomically, together with an index of the sizes and digests of its files, unless it exists.

    A folder that exists is checked against its index. A damaged folder is reported on stderr and made again.

    Args:
        folder: Path of the folder.
        write: Writes the files into the empty temporary folder that it is given; returns more content of the index.
        adopt: Returns the index of a folder of an earlier version, which has no digests; None if it is damaged.
        index: Name of the index.

    Returns:
        The content of the index.

    Raises:
        ConfigError: The disk is full, or a damaged folder would not be the same again; it stays as it is.
    """
    remove_leftovers(folder.parent)
    found = read_sealed(folder / index)
    damage = None
    if folder.exists():
        if found is None and (adopted := adopt(folder)) is not None:
            found = dict(adopted)
            with suppress(OSError):  # without the permission to write, every process adopts the folder anew
                write_sealed(folder / index, found)
        damage = find_damage(folder, found["files"]) if found else f"{index} is missing or does not fit the files"
        if found is not None and damage is None:
            return found
        warn(f"{folder}: {damage}; the folder is made again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_partial(folder, 0) as partial:
        partial.mkdir()
        content = write(partial)
        made = {**content, "files": describe_files(partial)}
        if found is not None and (changed := list_changed(found["files"], made["files"])):
            raise ConfigError(
                f"{folder}: {damage}, and {changed[0]} would be another one if it were made again; "
                f"remove the folder to accept that"
            )
        sync_files(partial)
        write_sealed(partial / index, made)
        replace_folder(partial, folder, lambda: read_sealed(folder / index) == made)
    return made


def list_changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the names of the files whose digests differ between two indices."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def replace_folder(partial: Path, folder: Path, is_done: Callable[[], bool]) -> None:
    """Rename a folder that this process wrote, in place of an earlier one, unless another process did the same."""
    old = make_partial_path(folder)
    with suppress(FileNotFoundError):
        os.replace(folder, old)
    try:
        os.replace(partial, folder)
    except OSError:
        if not is_done():
            raise
    finally:
        remove(old)
