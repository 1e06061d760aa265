"""Read the user's own files. The suffix of a file determines its format, without regard to case."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mode.config.data import FilesSource
from mode.core.errors import ConfigError
from mode.core.files import expand_home

BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""Byte order marks of encodings other than UTF-8."""


def expand_paths(source: FilesSource) -> list[Path]:
    """List the files that a source's paths, folders and globs match. Hidden files inside a folder are left out."""
    files: list[Path] = []
    for pattern in source.paths:
        path = expand_home(pattern)
        if path.is_dir():
            items = [item for item in sorted(path.rglob("*")) if not is_hidden(item.relative_to(path))]
        else:
            items = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        files += [item for item in items if item.is_file()]
        if not items:
            raise ConfigError(f"{pattern}: no such file or folder")
    return files


def is_hidden(path: Path) -> bool:
    """Return whether a relative path, or a folder on it, is hidden.

    >>> is_hidden(Path(".git/config")), is_hidden(Path("notes/a.txt"))
    (True, False)
    """
    return any(part.startswith(".") for part in path.parts)


def split_suffix(path: Path) -> tuple[str, str]:
    """Return the suffix of a file's format, and the suffix of its compression, if any, both in lower case.

    >>> split_suffix(Path("a.JSONL.gz")), split_suffix(Path("notes/b.txt"))
    (('.jsonl', '.gz'), ('.txt', ''))
    """
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in DECOMPRESS else (suffix, "")


def read_file(path: Path, source: FilesSource) -> Iterator[str]:
    """Yield the documents of a local file: its rows if it is a table or JSON, otherwise its text.

    Raises:
        ConfigError: The file is damaged, not in the format of its suffix, not UTF-8, or lacks the column.
    """
    suffix, compression = split_suffix(path)
    data = path.read_bytes()
    if compression:
        try:
            data = DECOMPRESS[compression](data)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"{path}: damaged {compression} file ({error})") from error
    if suffix == ".parquet":
        return read_parquet(path, data, source.column)
    text = decode_text(path, data)
    if suffix in READERS:
        return READERS[suffix](path, text, source.column)
    return divide_text(text, source.separator)


def decode_text(path: Path, data: bytes) -> str:
    """Return the text of a file without its byte order mark, and with line feeds as line ends.

    Raises:
        ConfigError: The file is not UTF-8 text.
    """
    known = BOMS.get(data[:2])
    if known or b"\0" in data:
        raise ConfigError(
            f"{path}: not UTF-8 text but {known or 'binary data or UTF-16'}; UTF-16 text is converted by "
            f"`iconv -f UTF-16 -t UTF-8`"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}); Latin-1 text is converted by `iconv -f LATIN1 -t UTF-8`"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def divide_text(text: str, separator: str | None) -> Iterator[str]:
    """Yield the documents of a text file: the whole text, or the parts between separators that are not blank."""
    return iter([text]) if separator is None else (part for part in text.split(separator) if part.strip())


def read_json(path: Path, text: str, column: str) -> Iterator[str]:
    """Yield the documents of a JSON file: a list of objects, one object, or one object per line."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from read_json_lines(path, text, column)
            return
        raise ConfigError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield pick_text(row, column, f"{path}: row {number}")


def read_json_lines(path: Path, text: str, column: str) -> Iterator[str]:
    """Yield the documents of a file with one JSON object per line. Blank lines are skipped."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: line {number} is not JSON ({error.msg})") from error
        except RecursionError as error:
            raise ConfigError(f"{path}: line {number} is nested too deeply") from error
        except ValueError as error:  # an integer of thousands of digits
            raise ConfigError(f"{path}: line {number} cannot be read as JSON ({error})") from error
        yield pick_text(row, column, f"{path}: line {number}")


def read_table(path: Path, text: str, column: str, separator: str) -> Iterator[str]:
    """Yield the documents of a table with a header row and values in quotes where they need them."""
    csv.field_size_limit(sys.maxsize)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        names = table.fieldnames or []
        if names and column not in names:
            raise ConfigError(f"{path}: no column '{column}'; available: {', '.join(names)}")
        for row in table:
            if None in row or None in row.values():  # more or fewer values than names
                raise ConfigError(
                    f"{path}: the row that ends in line {table.line_num} does not have {len(names)} values; "
                    f"a value with a line break or a separator needs quotes"
                )
            yield check_text(row[column], f"{path}: line {table.line_num}, column '{column}'")
    except csv.Error as error:
        raise ConfigError(f"{path}: line {table.reader.line_num} is not a row of a table ({error})") from error


def read_csv(path: Path, text: str, column: str) -> Iterator[str]:
    """Yield the documents of a table with commas between values."""
    return read_table(path, text, column, ",")


def read_tsv(path: Path, text: str, column: str) -> Iterator[str]:
    """Yield the documents of a table with tabs between values."""
    return read_table(path, text, column, "\t")


def read_parquet(path: Path, data: bytes, column: str) -> Iterator[str]:
    """Yield the documents of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
        if column not in file.schema_arrow.names:
            raise ConfigError(f"{path}: no column '{column}'; available: {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(columns=[column]):
            yield from (check_text(text, f"{path}: column '{column}'") for text in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error


def pick_text(row: Any, column: str, where: str) -> str:
    """Return the text in a row of JSON.

    >>> pick_text({"body": "one"}, "text", "row 1")
    Traceback (most recent call last):
    mode.core.errors.ConfigError: row 1 has no column 'text'; available: body
    """
    if not isinstance(row, dict) or column not in row:
        known = f"; available: {', '.join(list(row)[:8])}" if isinstance(row, dict) and row else ""
        raise ConfigError(f"{where} has no column '{column}'{known}")
    return check_text(row[column], f"{where}, column '{column}'")


def check_text(value: object, where: str) -> str:
    """Return a value after checking that it is text and can be encoded as UTF-8.

    >>> check_text(None, "row 3")
    Traceback (most recent call last):
    mode.core.errors.ConfigError: row 3: expected text, got NoneType
    """
    if not isinstance(value, str):
        raise ConfigError(f"{where}: expected text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: unpaired surrogate, which is not valid text") from error
    return value


def decompress_zstd(data: bytes) -> bytes:
    """Return the content of a Zstandard file."""
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise ConfigError("a .zst file needs pyarrow with Zstandard: pip install --force-reinstall pyarrow")
    with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
        content: bytes = stream.read()
    return content


DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".zst": decompress_zstd}


READERS: dict[str, Callable[[Path, str, str], Iterator[str]]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
"""Readers of text files with several documents, by suffix."""
