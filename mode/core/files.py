"""The files in a run's work folder: their names, the folder's lock, and atomic writes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from mode.core.errors import ConfigError, warn

CURVE = "curve.jsonl"
"""Loss curve of a run."""


AGAIN = "again"
"""Marker of a run that starts over because of `--again`."""


SETTINGS = "run.yaml"
"""Resolved settings of a run."""


WEIGHTS = "weights.safetensors"
"""Trained weights of a run."""


INDEX = "digests.json"
"""Index of a folder that is checked: the size and the sha256 of every file."""


DIGEST = "digest"
"""Key of the digest of a JSON object, in the object."""


PARTIAL = ".partial"
"""Suffix of files and folders that are being written."""


HOST = os.uname().nodename
"""Name of this machine."""


OWN = re.compile(rf"\.(?P<name>.+)\.{re.escape(HOST)}-(?P<pid>\d+)-\d+{re.escape(PARTIAL)}")
"""Names of the files and folders that processes of this machine are writing, or left when they were killed."""


_numbers = itertools.count()
"""Numbers of the files that this process writes, so that two threads never share a name."""


A_DAY = 24 * 60 * 60.0
"""Seconds after which a half-written file of another machine is taken to be abandoned."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write for which the disk, a quota or a limit on files has no room."""


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint that a run writes after a step."""
    return folder / f"checkpoint-{step}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints in the order of their steps."""
    found = {path: re.fullmatch(r"checkpoint-([0-9]+)", path.name) for path in folder.glob("checkpoint-*")}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=lambda path: steps[path])


def remove(*paths: Path) -> None:
    """Remove files and folders. Missing files are ignored.

    A folder is renamed before its files are removed, so a crash never leaves part of it under its name.
    """
    for path in paths:
        if path.is_dir():
            hidden = path
            if not path.name.endswith(PARTIAL):
                os.replace(path, hidden := make_partial_path(path))
            shutil.rmtree(hidden)
        else:
            path.unlink(missing_ok=True)


def make_partial_path(path: Path) -> Path:
    """Return a new path beside a file or a folder, under which this process writes it."""
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}-{next(_numbers)}{PARTIAL}")


def remove_leftovers(folder: Path) -> None:
    """Remove the files and folders that killed processes left half-written in a folder.

    The name of such a file has the machine and the id of its process. A file of a living process stays. A file of
    another machine, whose processes are not visible here, is removed a day after its last change.
    """
    with suppress(OSError):  # the folder is missing or not readable
        for entry in list(os.scandir(folder)):
            if not entry.name.startswith(".partial-") and not (entry.name[0] == "." and entry.name.endswith(PARTIAL)):
                continue
            with suppress(OSError):  # another process removed the file first, or the folder is not writable
                if match := OWN.fullmatch(entry.name):
                    dead = not is_alive(int(match["pid"]))
                else:
                    dead = time.time() - entry.stat(follow_symlinks=False).st_mtime > A_DAY
                if dead:
                    remove(Path(entry.path))


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine is alive."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def write_partial(path: Path, size: int) -> Iterator[Path]:
    """Yield the path under which this process writes a file or a folder before it renames it to `path`.

    What the block leaves under this path is removed at its end, as are the leftovers of killed processes.

    Args:
        path: The file or folder to write. Its parent exists.
        size: Number of bytes that the block writes, for the message of a full disk.

    Raises:
        ConfigError: The disk is full.
    """
    remove_leftovers(path.parent)
    partial = make_partial_path(path)
    with reporting_full_disk(path, size):
        try:
            yield partial
        finally:
            remove(partial)


@contextmanager
def reporting_full_disk(path: Path, size: int) -> Iterator[None]:
    """Report a full disk with the path that was written, the bytes that it needs, and those that were free before.

    Args:
        path: The file or folder that the block writes.
        size: Number of bytes that it needs.

    Raises:
        ConfigError: The disk is full.
    """
    free = measure_free_space(path)
    try:
        yield
    except Exception as error:
        if reason := find_full_disk(error):
            raise full_disk_error(path, reason, size, free) from error
        raise


def find_full_disk(error: BaseException) -> str | None:
    """Return why a write failed if the disk, a quota or a limit on files is exhausted; else None."""
    numbers = [n for n in FULL if getattr(error, "errno", None) == n or f"os error {n})" in str(error)]
    return os.strerror(numbers[0]) if numbers else None


def full_disk_error(path: Path, reason: str, size: int, free: int) -> ConfigError:
    """Return the error of a file or folder that the disk has no space for."""
    match = OWN.fullmatch(path.name)
    shown = path.with_name(match["name"]) if match else path
    needed = f"{format_bytes(size)} needed, {format_bytes(free)} free"
    return ConfigError(f"{shown}: cannot be written: {reason} ({needed}); make space and repeat the command")


def measure_free_space(path: Path) -> int:
    """Return the free bytes of the disk of a path that need not exist."""
    there = next((each for each in path.absolute().parents if each.is_dir()), Path("/"))
    return shutil.disk_usage(there).free


def format_bytes(size: float) -> str:
    """Render a number of bytes.

    >>> format_bytes(312), format_bytes(1_234_567)
    ('312 bytes', '1.2 MB')
    """
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:.0f} bytes"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically: after a crash at any moment it has the old content or the new, never a part.

    Raises:
        ConfigError: The disk is full.
    """
    with write_partial(path, len(data)) as partial:
        write_synced(partial, data)
        os.replace(partial, path)


def write_synced(path: Path, data: Any) -> None:
    """Write bytes, or the bytes of an array, to a file and wait until they are on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_files(folder: Path) -> None:
    """Wait until all files of a folder are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConfigError: The file is missing, not UTF-8 text, not JSON, not an object, or nested too deeply.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ConfigError(f"{path}: not readable: nested too deeply") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return content


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


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, so that two processes never train the same run.

    The operating system releases the lock when the process ends. A folder that holds nothing else is removed.

    Raises:
        ConfigError: Another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{folder}: another process is training this run") from error
        remove(*folder.glob(f".*{PARTIAL}"))  # of killed processes: only the holder of the lock writes here
        try:
            yield
        finally:
            if all(path.name == "lock" for path in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
